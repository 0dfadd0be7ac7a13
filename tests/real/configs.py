"""Configurations of published models, without what no loader reads; and their parameters, which are those that transformers'
model of the same configuration has."""

LLAMA3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LONG = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"}


def config(family, hidden, inner, layers, heads, kv_heads, vocab, **rest):
    return {"model_type": family, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "torch_dtype": "bfloat16", **rest}


def llama(*shape, **rest):
    return config("llama", *shape, **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_scaling": None,
                                      "tie_word_embeddings": False, "attention_bias": False, "pretraining_tp": 1, **rest})


def llama3(*shape, **rest):
    return llama(*shape, 128256, **{"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3_1, "eos_token_id": [128001, 128008, 128009], **rest})


def mistral(*shape, **rest):
    return config("mistral", *shape, **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, **rest})


def falcon(hidden, layers, heads, vocab=65024, **rest):
    return {"model_type": "falcon", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
            "alibi": False, "bias": False, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "layer_norm_epsilon": 1e-5,
            "apply_residual_connection_post_layernorm": False, "bos_token_id": 11, "eos_token_id": 11, "torch_dtype": "bfloat16", **rest}


def refined_web(family, hidden, layers, heads, vocab=65024, **rest):
    """The configuration of the code that Falcon first came with."""
    return {"model_type": family, "architectures": ["RWForCausalLM"], "hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab,
            "alibi": False, "bias": False, "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0,
            "attention_dropout": 0.0, "bos_token_id": 11, "eos_token_id": 11, "torch_dtype": "bfloat16", **rest}


def qwen2(*shape, **rest):
    return config("qwen2", *shape, **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": 131072,
                                      "use_sliding_window": False, "max_window_layers": shape[2], "tie_word_embeddings": False, **rest})


def qwen3(*shape, **rest):
    return config("qwen3", *shape, 151936, **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1000000, "head_dim": 128, "rope_scaling": None,
                                              "sliding_window": None, "use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": False, **rest})


def phi3(*shape, **rest):
    return config("phi3", *shape, **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
                                     "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False, "attention_bias": False, "pad_token_id": 32000, **rest})


def gemma2(*shape, **rest):
    return config("gemma2", *shape, 256000, **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
                                               "rope_theta": 10000.0, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
                                               "final_logit_softcapping": 30.0, "attention_bias": False, **rest})


def gemma3(**text):
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "image_token_index": 262144, "mm_tokens_per_image": 256,
            "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
            "text_config": {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, **text},
            "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
                              "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}}


def mixtral(*shape, **rest):
    return config("mixtral", *shape, **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
                                        "num_experts_per_tok": 2, "output_router_logits": False, "tie_word_embeddings": False, **rest})


# Name: configuration, parameters (of Gemma 3 the text model's; a tied output projection counts once).
MODELS = {
    "Mistral-7B-v0.1": (mistral(4096, 14336, 32, 32, 8, 32000, rope_theta=10000.0, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-v0.2": (mistral(4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Mistral-7B-v0.3": (mistral(4096, 14336, 32, 32, 8, 32768), 7_248_023_552),
    "Mistral-Nemo-2407": (mistral(5120, 14336, 40, 32, 8, 131072, head_dim=128, max_position_embeddings=1024000), 12_247_782_400),
    "Llama-2-7b": (llama(4096, 11008, 32, 32, 32, 32000, torch_dtype="float16"), 6_738_415_616),
    "Llama-2-13b": (llama(5120, 13824, 40, 40, 40, 32000, torch_dtype="float16"), 13_015_864_320),
    "Llama-2-70b": (llama(8192, 28672, 80, 64, 8, 32000, torch_dtype="float16"), 68_976_648_192),
    "Meta-Llama-3-8B": (llama3(4096, 14336, 32, 32, 8, rope_scaling=None, max_position_embeddings=8192), 8_030_261_248),
    "Llama-3.1-8B": (llama3(4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama-3.2-1B": (llama3(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, rope_scaling={**LLAMA3_1, "factor": 32.0}), 1_235_814_400),
    "Llama-3.2-3B": (llama3(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True, rope_scaling={**LLAMA3_1, "factor": 32.0}), 3_212_749_824),
    "Llama-3.3-70B": (llama3(8192, 28672, 80, 64, 8), 70_553_706_496),
    "Llama-3.1-405B": (llama3(16384, 53248, 126, 128, 8), 405_853_388_800),
    "falcon-7b (RefinedWebModel)": (refined_web("RefinedWebModel", 4544, 32, 71, multi_query=True, parallel_attn=True), 6_921_720_704),
    "falcon-7b": (falcon(4544, 32, 71), 6_921_720_704),
    "falcon-40b (RefinedWeb)": (refined_web("RefinedWeb", 8192, 60, 128, n_head_kv=8, parallel_attn=True), 41_303_293_952),
    "falcon-40b": (falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True), 41_303_293_952),
    "falcon-180B": (falcon(14848, 80, 232, num_kv_heads=8, new_decoder_architecture=True), 178_557_088_768),
    "falcon-rw-1b (RefinedWebModel)": (refined_web("RefinedWebModel", 2048, 24, 32, 50304, alibi=True, bias=True, multi_query=False, parallel_attn=False), 1_311_625_216),
    "falcon-rw-1b": (falcon(2048, 24, 32, 50304, alibi=True, bias=True, multi_query=False, parallel_attn=False), 1_311_625_216),
    "falcon-11B": (falcon(4096, 60, 32, num_kv_heads=8, new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False, ff_factor=4, ffn_hidden_size=16384, rope_theta=500042, max_position_embeddings=8192), 11_102_822_400),
    "Qwen2-7B": (qwen2(3584, 18944, 28, 28, 4, 152064, max_position_embeddings=131072), 7_615_616_512),
    "Qwen2.5-0.5B": (qwen2(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-1.5B": (qwen2(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True), 1_543_714_304),
    "Qwen2.5-14B": (qwen2(5120, 13824, 48, 40, 8, 152064), 14_770_033_664),
    "Qwen2.5-32B": (qwen2(5120, 27648, 64, 40, 8, 152064), 32_763_876_352),
    "Qwen2.5-72B": (qwen2(8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True), 596_049_920),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8), 8_190_735_360),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64, 8), 32_762_123_264),
    "Qwen3-30B-A3B": ({**qwen3(2048, 6144, 48, 32, 4), "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
                       "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}, 30_532_122_624),
    "Phi-3-mini-4k": (phi3(3072, 8192, 32, 32, 32, 32064), 3_821_079_552),
    "Phi-3.5-mini": (phi3(3072, 8192, 32, 32, 32, 32064, max_position_embeddings=131072, sliding_window=262144, rope_scaling=LONG), 3_821_079_552),
    "Phi-3-medium-4k": (phi3(5120, 17920, 40, 40, 10, 32064), 13_960_238_080),
    "Phi-4-mini": (phi3(3072, 8192, 32, 24, 8, 200064, max_position_embeddings=131072, sliding_window=262144, rope_scaling=LONG, partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=199999), 3_836_021_760),
    "phi-4": (phi3(5120, 17920, 40, 40, 10, 100352, max_position_embeddings=16384, original_max_position_embeddings=16384, rope_theta=250000, sliding_window=None, pad_token_id=100349), 14_659_507_200),
    "gemma-2-2b": (gemma2(2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-2-9b": (gemma2(3584, 14336, 42, 16, 8), 9_241_705_984),
    "gemma-2-27b": (gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144), 27_227_128_320),
    "gemma-3-1b": (config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
                          rope_local_base_freq=10000, rope_theta=1000000, rope_scaling=None, sliding_window=512, sliding_window_pattern=6), 999_885_952),
    "gemma-3-4b": (gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3_880_263_168),
    "gemma-3-12b": (gemma3(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8), 11_766_034_176),
    "gemma-3-27b": (gemma3(hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168), 27_009_346_304),
    "Mixtral-8x7B": (mixtral(4096, 14336, 32, 32, 8, 32000), 46_702_792_704),
    "Mixtral-8x22B": (mixtral(6144, 16384, 56, 48, 8, 32000, max_position_embeddings=65536), 140_620_634_112),
}

# Meta's own form: params.json, files, parameters (the vocabulary is that of the tokenizer).
META = {
    "LLaMA-7B": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}, 1, 6_738_415_616),
    "LLaMA-13B": ({"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1}, 2, 13_015_864_320),
    "LLaMA-30B": ({"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06, "vocab_size": -1}, 4, 32_528_943_616),
    "LLaMA-65B": ({"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}, 8, 65_285_660_672),
    "Llama-2-70B": ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}, 8, 68_976_648_192),
}
