"""Experts: profiles of LLMs on GPUs, and timing profiles fitted to kernel measurements."""
