"""The results of a sweep.

ranking.py  feasible trials, their rank, the Pareto front, values as they are written in tables
table.py    the table on the terminal, and one line per finished trial
report.py   sweep.html, trials.csv and the cards: writes them all
page.py     the HTML of sweep.html
figures.py  its figures, drawn by matplotlib
card.py     a trial as an experiment card, which the train command runs

trials of the store -> ranking -> report -> page (figures), card
"""
