"""The Hub on loopback, here too."""

from ..hub.conftest import hub as hub
