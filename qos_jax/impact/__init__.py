"""The action impact estimator: what placing a request on an expert would do to it and to the requests there."""
