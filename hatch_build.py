"""Compiles taskvec/run/native.c when the package is built, if there is a C compiler; without one the package is pure Python.

-ffp-contract=off: the numeric contract forbids fused multiply-add. -fno-trapping-math lets comparisons vectorise; it changes
no value. TASKVEC_NO_NATIVE=1 leaves it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]


class NativeKernelHook(BuildHookInterface):
    """The build hook that hatchling calls for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build `_native.so` beside its source and tell the wheel about it."""
        source = Path(self.root) / "taskvec" / "run" / "native.c"
        library = source.with_name("_native.so")
        compiler = os.environ.get("CC") or shutil.which("cc")
        if os.environ.get("TASKVEC_NO_NATIVE") == "1" or not compiler:
            return
        made = library.with_suffix(f".{os.getpid()}.tmp")
        try:
            command = [*compiler.split(), *FLAGS, "-o", str(made), str(source)]
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            self.app.display_warning(f"native.c was not compiled, numpy will do its work: {str(detail)[-500:]}")
            return
        made.replace(library)
        build_data["artifacts"].append("taskvec/run/_native.so")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + re.sub("[-.]", "_", sysconfig.get_platform())
