"""Continued pre-training: a new run begins with the weights of a model that exists."""
