"""Teachers: log-probabilities of given tokens, the likeliest of every distribution, and the store of them."""
