"""Report of a run: what is wrong, how large each part of the error is, the misclassified images, what to try next.

    command.py       run folder -> RUN/report.html and RUN/report.json
    measurements.py  predictions of the best weights on a sample of each split, with facts of each image
    decomposition.py error per split -> avoidable bias, variance, data mismatch, overfitting to validation
    slices.py        error by class, brightness, contrast and the user's groups; most confused classes
    calibration.py   reliability of the probabilities: bins, expected calibration error, temperature
    comparison.py    several runs: experiments paired over their seeds, with an interval on the difference
    figures.py       the plots of the page
    page.py          the HTML page, from report.html.j2 or comparison.html.j2

run folder -> measurements -> diagnosis.run_rules, decomposition, slices, calibration -> page
"""
