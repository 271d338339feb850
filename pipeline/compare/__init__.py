"""`deberta compare`: systems trained on equal budgets, measured and put side by side."""
