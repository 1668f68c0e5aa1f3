"""Training of small agents: tokenizer, data, tasks, stages. Importing this package imports nothing else."""
