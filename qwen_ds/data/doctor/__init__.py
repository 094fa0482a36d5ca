"""The data doctor: one streaming pass over a data set that names what is wrong with it."""
