"""What the Snakefile asks before any work: inputs, the machine, the cluster."""
