"""NeuroAL: search lambda for the blocks, then for the rows, by neuron alignment (the paper's section 3)."""
