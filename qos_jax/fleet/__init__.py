"""The experts: LLMs on GPUs, and timing profiles fitted to kernel measurements."""
