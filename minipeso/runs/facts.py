"""What the Hub holds and the paper counts, for --dry-run, which downloads nothing."""
LLAMA_1B = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
                rope_theta=500000.0, rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                                                       high_freq_factor=4.0, original_max_position_embeddings=8192))
LLAMA_3B = LLAMA_1B | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
SHARDS = ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))]  # of the 3B
MODELS = {"Llama-3.2-1B": (LLAMA_1B, ["model.safetensors"]), "Llama-3.2-3B": (LLAMA_3B, SHARDS)}  # shape, weight files
HUB_BYTES = {  # of the pinned revisions
    "Musical_Instruments.csv": 172_583_864, "meta_Musical_Instruments.jsonl": 631_877_970, "tokenizer.json": 9_085_657,
    "model.safetensors": 2_471_645_608, **dict(zip(SHARDS, (20_919, 4_965_799_096, 1_459_729_952)))}
TABLE_4 = {  # (users, interactions) of D1 .. D5
    "Musical_Instruments": ((17046, 141788), (1772, 13197), (1821, 13334), (2289, 18811), (2238, 17573)),
    "Movies_and_TV": ((17928, 190411), (1866, 17665), (2106, 19874), (2284, 22929), (2332, 22225)),
    "Books": ((15406, 164858), (1807, 13918), (1672, 12395), (1948, 14824), (1652, 11990))}
