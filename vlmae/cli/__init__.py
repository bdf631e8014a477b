"""The command line: experiments, and one command `vlmae` for everything else."""

from vlmae.parallel.exit_codes import leave_when_told

leave_when_told()  # before all other imports, which take seconds
