"""Private names of libraries: each one is listed here and exists, and its library has an upper version bound."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERNALS = {
    "torch": [
        "torch._foreach_add_",
        "torch._foreach_copy_",
        "torch._foreach_lerp_",
        "torch._foreach_mul_",
        "torch._foreach_norm",
        "torch._foreach_sub",
        "torch._inductor",
        "torch.mps._get_default_mps_generator",
        "torch.utils.tensorboard.summary.hparams",
    ],
    "optuna": [
        "optuna.storages._rdb.models.StudyModel.find_or_raise_by_id",
        "optuna.storages._rdb.models.StudyUserAttributeModel",
        "optuna.storages._rdb.models.TrialHeartbeatModel.where_trial_id",
        "optuna.storages._rdb.models.TrialModel.find_or_raise_by_id",
        "optuna.storages._rdb.models.TrialSystemAttributeModel",
    ],
    "hydra-core": [
        "hydra.core.global_hydra.GlobalHydra",
        "hydra.core.hydra_config.HydraConfig",
        "hydra.core.override_parser.overrides_parser.OverridesParser",
        "hydra.core.override_parser.types.Override.is_hydra_override",
        "hydra.core.override_parser.types.Override.sweep_iterator",
        "hydra.core.override_parser.types.ValueType.GLOB_CHOICE_SWEEP",
        "hydra.errors.HydraException",
        "hydra.errors.MissingConfigException",
    ],
    "omegaconf": ["omegaconf.resolvers.oc", "omegaconf.errors.OmegaConfBaseException"],
    "tensorboard": [
        "tensorboard.backend.event_processing.event_file_loader.EventFileLoader",
        "tensorboard.backend.event_processing.event_file_loader.RawEventFileLoader",
        "tensorboard.compat.proto.event_pb2.Event",
        "tensorboard.compat.proto.event_pb2.SessionLog",
        "tensorboard.compat.proto.summary_pb2.Summary",
        "tensorboard.plugins.hparams.plugin_data_pb2.HParamsPluginData",
        "tensorboard.summary.writer.event_file_writer",
        "tensorboard.summary.writer.record_writer.RecordWriter",
    ],
}
NAMES = {name for names in INTERNALS.values() for name in names}
SOURCES = {
    path: path.read_text() for folder in ("src", "scripts", "bench") for path in sorted((ROOT / folder).rglob("*.py"))
}


def resolved(name: str) -> object:
    """Return the object of a dotted name, whose first parts are modules."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for end in range(2, len(parts) + 1):
        if not hasattr(value, parts[end - 1]):
            importlib.import_module(".".join(parts[:end]))
        value = getattr(value, parts[end - 1])
    return value


@pytest.mark.parametrize("name", sorted(NAMES))
def test_internal_name_exists_and_is_used(name):
    assert resolved(name) is not None
    assert any(re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", source) for source in SOURCES.values())


def test_all_private_names_in_use_are_listed():
    used = set()
    for source in SOURCES.values():
        for name in re.findall(r"\btorch(?:\.\w+)*\._[a-z]\w*", source):
            used.add(name)
        for module in re.findall(r"^\s*(?:from|import) ([\w.]*\._[a-z][\w.]*)", source, re.M):
            used.add(module)
    listed = {name for name in NAMES if "._" in name}
    assert {name for name in used if not any(f"{item}.".startswith(f"{name}.") for item in listed)} == set()
    assert {name for name in listed if not any(f"{name}.".startswith(f"{item}.") for item in used)} == set()


def test_library_whose_internals_are_used_has_an_upper_bound():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {re.split(r"[<>=]", item)[0]: item for item in dependencies}
    assert {library for library in INTERNALS if "<" not in bounds[library]} == set()
