"""`deberta report`: the curves and events of runs on one page."""
