"""Do maps and searches give the same over the executors of dask, ray and submitit as without one?

They bring much along, so they get a folder of their own beside the environment that reftlens is installed in:

    .venv/bin/pip install --target others -c constraints.txt distributed ray submitit
    PYTHONPATH=.:tests:others .venv/bin/python tests/outside/executors.py [dask|submitit|ray …]

Each computes a map of two layers and a search on the small planted model of the tests, in processes of its own, and
compares them with those computed here; it ends with an error where they differ.
"""

import sys
import tempfile
from contextlib import contextmanager


@contextmanager
def on_dask():
    from dask.distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        yield client.get_executor()


class OnRay:
    """ray has no executor; its references give a future."""

    def submit(self, fn, *args):
        import ray

        return ray.remote(fn).remote(*args).future()


@contextmanager
def on_ray():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield OnRay()
    finally:
        ray.shutdown()


@contextmanager
def on_submitit():
    import submitit

    with tempfile.TemporaryDirectory() as folder:
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(timeout_min=30)
        yield executor


EXECUTORS = {"dask": on_dask, "submitit": on_submitit, "ray": on_ray}


def main(names):
    import test_interchange_map as maps
    import test_search as searches

    expected = maps._map(), searches._search()
    for name in names:
        with EXECUTORS[name]() as executor:
            grid = maps._map(maps._loaded, executor=executor)
            found = searches._search(searches._model, executor=executor)
        assert grid == expected[0], f"{name}: another map"
        searches.same(found, expected[1])
        print(f"{name}: {len(grid.cells)} cells and {len(found.trials)} trials are those computed without", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or EXECUTORS)
