"""Train adapters on the packed weights of a GGUF file; needs torch and transformers (the extra ``train``).

`packed` maps a file's quantized rows, `layers` multiplies with them, `configs` and `model` build transformers' model
around them, `adapters` puts the trainable factors beside them. `rows` and `samples` turn files into token lists,
`batches` orders them, `loop` trains, `served` asks llama.cpp what it makes of the factors, `run` is the whole run.
"""
