"""The action impact estimator: the predicted effect of a placement on the request and on the others on the expert."""
