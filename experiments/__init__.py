"""Programs run as modules: launchers of the installed programs, studies and measurements."""
