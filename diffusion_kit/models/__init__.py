"""Networks: where they come from, how they are run, prompts and pictures in and out of latents."""
