"""Diagnosis: rules that turn evidence into findings. Pure functions of numbers and names, without torch.

    finding.py    Finding: what is wrong with a training, how sure that is, and what to type next

Other packages gather the evidence (`trainer.monitor`, `analysis`), call the rules, and print or write the findings.
docs/diagnosis.md has a section for each id.
"""
