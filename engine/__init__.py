"""The step: configuration, model runner, sampler, engine core and its Python faces."""
