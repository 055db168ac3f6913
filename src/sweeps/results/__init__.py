"""The results of a sweep.

ranking.py  order of the trials, feasible trials, Pareto front; values as text for tables
table.py    terminal output: a live table, and one line per finished trial
report.py   write sweep.html, trials.csv and the cards
page.py     the HTML page sweep.html
figures.py  the figures of sweep.html, drawn by matplotlib
card.py     experiment cards: the config of a trial as a YAML file that a training can use

trials of the store -> ranking -> report -> page (figures), card
"""
