"""Diagnosis: rules that turn evidence into findings. Pure functions of numbers and names, without torch.

    finding.py       Finding: what is wrong with a training, how sure that is, and what to type next
    start_evidence.py  what is known before the first step: model, first batch, splits
    model_rules.py   rules on an initialised model
    data_rules.py    rules on the splits
    run_evidence.py  what is known of a run that has ended: learning curves, errors per split, config
    run_rules.py     all rules on that evidence: run_findings
    curve_rules.py   rules on learning curves
    error_rules.py   rules on the errors per split
    remedies.py      overrides to paste, for the config of a run

Other packages gather the evidence (`trainer.monitor`, `analysis`), call the rules, and print or write the findings.
docs/diagnosis.md has a section for each id.
"""
