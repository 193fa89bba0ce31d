"""From an observation to numbers: flat vectors, graphs, and the heterogeneous graph attention network (HAN)."""
