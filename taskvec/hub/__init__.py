"""The world outside: a finished output goes to the Hub."""
