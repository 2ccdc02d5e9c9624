"""What the launcher `slurm` is made of: its settings, its script, its programs, what the cluster says."""
