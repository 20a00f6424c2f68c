"""Package list of omni_engine: the repository root is the package, the six folders are its subpackages."""

from setuptools import find_packages, setup

FOLDERS = ("engine", "scheduler", "kvcache", "models", "ops", "server")

if __name__ == "__main__":
    setup(
        packages=[
            f"omni_engine.{package}" for folder in FOLDERS for package in find_packages(include=[folder, f"{folder}.*"])
        ],
        package_dir={"omni_engine": "."},
        package_data={
            "omni_engine.models": ["demo/README.md", "demo/deepseek/*", "demo/deepseek-v32/*"],
            "omni_engine.ops.cpu": ["csrc/*"],
            "omni_engine.ops.npu.simulator": ["*.c"],
            "omni_engine.server.ui": ["static/*"],
        },
        py_modules=["omni_engine.__init__"],
    )
