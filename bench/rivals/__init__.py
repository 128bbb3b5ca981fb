"""The same work by others: eager torch (`eager.py`), torch.compile (`inductor.py`), and libraries of Triton kernels
that `setup.sh DIR` installs apart (`libraries.py`). `python -m bench.rivals DIR` counts or compiles the libraries'.
"""
