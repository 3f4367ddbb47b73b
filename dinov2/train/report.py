"""Former name of `python -m dinov2.report`, kept for existing commands."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dinov2.report", run_name="__main__", alter_sys=True)
