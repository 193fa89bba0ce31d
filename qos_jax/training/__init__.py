"""The host's side of training: the loop, held-out evaluation, run folders, devices, and loading of routers."""
