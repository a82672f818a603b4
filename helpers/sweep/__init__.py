"""Many runs of the notebooks: `python -m helpers.sweep sweeps/<name>.yaml`.

`plan` reads and checks the file, `driver` keeps the store and starts what is left to do, `pool` runs notebooks on this machine
in processes that are forked warm (`warm`, `kernels`), `cluster` runs them on the machines of a Ray cluster.
"""
