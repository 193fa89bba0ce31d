"""The host's side of training: the loop, validation, run folders, devices, and loading of routers."""
