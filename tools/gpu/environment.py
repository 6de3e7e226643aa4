"""Print the card and the versions of the packages as JSON; exit with 2 where there is no GPU."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "transformers", "transformer-lens", "accelerate", "numpy", "phaselens")


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Print the environment."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "packages": {package: installed(package) for package in PACKAGES},
        "card": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
