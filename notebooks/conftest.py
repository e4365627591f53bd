"""nbval compares every output but stderr, where warnings and progress bars go."""


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb":
        collector.skip_compare = (*collector.skip_compare, "stderr")
