"""Where models meet data: counts on disk, scores, ablation experiments, answers."""
