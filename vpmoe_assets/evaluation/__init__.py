"""Pure library: the CORE-8 bundle, from wherever its rows come, in one normalised form."""
