"""The one forward pass, paged KV cache, scheduler, sampling, perplexity and throughput. Never imports quant."""
