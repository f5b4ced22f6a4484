"""The command line: parse, call the API, print. One file per command; no logic that Python could not reach."""
