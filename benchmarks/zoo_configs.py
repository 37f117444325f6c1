"""Tiny settings for every transformers class that TransformerLens 4.3 has an adapter for, without remote code.

`COMMON` holds all names that some family gives to one and the same thing; each configuration takes those it knows.
A row of the table says only what is special: `{}` is a class that needs nothing of its own.
"""

from typing import Any

WIDTH, LAYERS, HEADS, KV_HEADS, D_HEAD, D_MLP, CONTEXT, WINDOW = 32, 3, 4, 2, 8, 48, 160, 16
_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING]


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


COMMON: dict[str, Any] = {
    **_same(WIDTH, "hidden_size d_model n_embd word_embed_proj_dim lru_width attention_hidden_size dim"),
    **_same(LAYERS, "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers"),
    **_same(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    **_same(HEADS, "decoder_attention_heads n_mamba_heads mamba_n_heads mamba_num_heads index_n_heads"),
    **_same(KV_HEADS, "num_key_value_heads num_global_key_value_heads linear_num_key_heads"),
    **_same(D_HEAD, "head_dim global_head_dim d_kv kv_channels linear_key_head_dim linear_value_head_dim"),
    **_same(D_HEAD, "hidden_size_per_layer_input"),
    **_same(D_MLP, "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    **_same(D_MLP, "shared_intermediate_size intermediate_size_mlp hidden_dim"),
    **_same(CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_same(CONTEXT, "max_encoder_position_embeddings max_decoder_position_embeddings"),
    **_same(WINDOW, "sliding_window window_size local_attention attention_window_size attention_chunk_size"),
    **_same(0.2, "initializer_range init_std"),
    # experts
    **_same(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(2, "num_experts_per_tok moe_k top_k_experts"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
    **_same(1, "num_dense_layers moe_layer_start_index num_sparse_encoder_layers num_sparse_decoder_layers"),
    **_same(16, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    # latent attention, indexers
    **_same(8, "kv_lora_rank q_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim"),
    **_same(8, "qk_rope_head_dim"),
    **_same(4, "index_topk"),
    # state spaces and linear attention
    **_same(8, "state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size adapter_rank"),
    **_same(16, "mamba_d_head mamba_head_dim"),
    **_same(1, "mamba_n_groups mamba_ngroups n_groups num_mem_blocks"),
    "linear_num_value_heads": HEADS,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 1,
    "decoder_start_token_id": 2,
}
"""The vocabulary is added by `zoo`."""

TOWER: dict[str, Any] = {
    **_same(16, "hidden_size d_model embed_dim intermediate_size encoder_ffn_dim ffn_dim out_hidden_size"),
    **_same(16, "output_proj_dims projection_dim vision_output_dim mm_embed_dim projector_input_dim"),
    **_same(16, "projector_output_dim num_mel_bins"),
    **_same(1, "num_hidden_layers encoder_layers depth num_layers"),
    **_same(2, "num_attention_heads encoder_attention_heads num_heads attention_heads num_key_value_heads"),
    **_same(8, "image_size patch_size head_dim mm_posemb_size position_embedding_size max_source_positions"),
    "vocab_size": 8,
}
"""Of the encoders of images and sounds, which text alone never reaches."""


def _of(names: str, **special: Any) -> dict[str, dict[str, Any]]:
    return {name: special for name in names.split()}


_CLIP = {"vision_config": {"model_type": "clip_vision_model"}}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"}}
_LLAMA, _QWEN2 = {"text_config": {"model_type": "llama"}}, {"text_config": {"model_type": "qwen2"}}
_MISTRAL = {"text_config": {"model_type": "mistral"}}
_HYBRID = {"layer_types": [_LINEAR, _FULL, _LINEAR]}
_MAMBA = {"layer_types": ["mamba", "attention", "mamba"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_GEMMA4 = {"layer_types": [_SLIDING, _SLIDING, _FULL], "global_head_dim": D_HEAD}
_CHUNKED = {"layer_types": ["chunked_attention", _FULL, "chunked_attention"]}
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "hidden_size": 32, "codebook_size": 8}
_DAVIT = {"depths": [1], "patch_size": [7], "patch_stride": [4], "patch_padding": [3], "patch_prenorm": [False],
          "embed_dim": [16], "num_heads": [2], "num_groups": [2]}  # fmt: skip
_LATENT = {"num_key_value_heads": HEADS}
_CONV = {"conv_dim": [16], "conv_stride": [4], "conv_kernel": [4], "num_conv_pos_embedding_groups": 2}

CLASSES: dict[str, dict[str, Any]] = {
    # dense decoders with rotary positions
    **_of("LlamaForCausalLM ArceeForCausalLM ApertusForCausalLM GraniteForCausalLM SeedOssForCausalLM GlmForCausalLM"),
    **_of("Glm4ForCausalLM Ernie4_5ForCausalLM HunYuanDenseV1ForCausalLM Jais2ForCausalLM NemotronForCausalLM"),
    **_of("BitNetForCausalLM CohereForCausalLM OlmoForCausalLM Olmo2ForCausalLM NanoChatForCausalLM"),
    **_of("HrmTextForCausalLM"),
    **_of("GemmaForCausalLM StableLmForCausalLM PhiForCausalLM GPTNeoXForCausalLM GPTJForCausalLM CodeGenForCausalLM"),
    **_of("Qwen2ForCausalLM Qwen3ForCausalLM"),
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1]},
    # with a sliding window
    **_of("MistralForCausalLM Ministral3ForCausalLM Starcoder2ForCausalLM Phi3ForCausalLM"),
    **_of("Gemma2ForCausalLM Gemma3ForCausalLM VaultGemmaForCausalLM Cohere2ForCausalLM", layer_types=_MIXED),
    **_of("Olmo3ForCausalLM Exaone4ForCausalLM ModernBertDecoderForCausalLM", layer_types=_MIXED),
    "Gemma4ForCausalLM": _GEMMA4,
    # other positions
    **_of("GPT2LMHeadModel GPTBigCodeForCausalLM OpenAIGPTLMHeadModel OPTForCausalLM XGLMForCausalLM"),
    **_of("BloomForCausalLM BloomModel MptForCausalLM FalconForCausalLM"),
    "GPTNeoForCausalLM": {"attention_types": [[["local", "global", "local"], 1]]},
    # experts
    **_of("MixtralForCausalLM OlmoeForCausalLM FlexOlmoForCausalLM GraniteMoeForCausalLM MiniMaxM2ForCausalLM"),
    **_of("Qwen2MoeForCausalLM Qwen3MoeForCausalLM Glm4MoeForCausalLM Ernie4_5_MoeForCausalLM JetMoeForCausalLM"),
    **_of("AfmoeForCausalLM GptOssForCausalLM LagunaForCausalLM", layer_types=_MIXED),
    # latent attention
    **_of("DeepseekV2ForCausalLM DeepseekV3ForCausalLM YoutuForCausalLM", **_LATENT),
    **_of("Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM", **_LATENT),
    "DeepseekV4ForCausalLM": {"hc_mult": 2},
    # state spaces, recurrence and hybrids
    **_of("MambaForCausalLM FalconMambaForCausalLM RwkvForCausalLM"),
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "JambaForCausalLM": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "Zamba2ForCausalLM": {"layers_block_type": [_LINEAR, "hybrid", _LINEAR]},
    "NemotronHForCausalLM": {"layers_block_type": [_LINEAR, _FULL, "mlp", "moe"]},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "position_embedding_type": "rope"},
    **_of("Lfm2ForCausalLM Lfm2MoeForCausalLM", layer_types=["conv", _FULL, "conv"]),
    **_of("Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM OlmoHybridForCausalLM", **_HYBRID),
    "RecurrentGemmaForCausalLM": {},
    "Llama4ForCausalLM": _CHUNKED,
    # text inside a multimodal class
    "Gemma3ForConditionalGeneration": {"text_config": {"layer_types": _MIXED}, **_SIGLIP},
    "Gemma3nForConditionalGeneration": {},
    **_of("Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration", text_config=_GEMMA4),
    **_of("LlavaForConditionalGeneration LlavaNextForConditionalGeneration", **_LLAMA, **_CLIP),
    "LlavaOnevisionForConditionalGeneration": {**_QWEN2, **_SIGLIP},
    "Mistral3ForConditionalGeneration": {**_MISTRAL, "vision_config": {"model_type": "pixtral"}},
    "Llama4ForConditionalGeneration": {"text_config": _CHUNKED},
    "Idefics3ForConditionalGeneration": _LLAMA,
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 3, "<|visual token 000000|>": 4}, "vq_config": _VQ},
    "MuseGlimmerForConditionalGeneration": {"out_hidden_size": 64, "projector_hidden_size": 16},
    **_of("Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration", text_config=_MROPE),
    **_of("Qwen3VLMoeForConditionalGeneration Glm4vForConditionalGeneration", text_config=_MROPE),
    **_of("Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration", text_config=_HYBRID),
    "Qwen2AudioForConditionalGeneration": {**_QWEN2, "audio_config": {"model_type": "qwen2_audio_encoder"}},
    **_of("AudioFlamingo3ForConditionalGeneration", **_QWEN2, audio_config={"model_type": "audioflamingo3_encoder"}),
    **_of("MusicFlamingoForConditionalGeneration", **_QWEN2, audio_config={"model_type": "audioflamingo3_encoder"}),
    "GlmAsrForConditionalGeneration": {**_LLAMA, "audio_config": {"model_type": "glmasr_encoder"}},
    # encoders and decoders
    **_of("BartForConditionalGeneration BlenderbotForConditionalGeneration LEDForConditionalGeneration"),
    **_of("M2M100ForConditionalGeneration MarianMTModel MBartForConditionalGeneration PegasusForConditionalGeneration"),
    **_of("T5ForConditionalGeneration MT5ForConditionalGeneration LongT5ForConditionalGeneration"),
    **_of("SwitchTransformersForConditionalGeneration T5GemmaForConditionalGeneration"),
    "T5Gemma2ForConditionalGeneration": {"encoder": _SIGLIP},
    "Florence2ForConditionalGeneration": {"text_config": {"model_type": "bart"}, "vision_config": _DAVIT},
    # encoders
    **_of("BertForMaskedLM BertLMHeadModel RobertaForMaskedLM"),
    # of sounds and images
    **_of("HubertForCTC HubertModel Wav2Vec2ForCTC Wav2Vec2ForPreTraining Wav2Vec2Model", **_CONV),
    **_of("ASTForAudioClassification ViTModel ViTForImageClassification DeiTModel DeiTForImageClassification"),
}

_QUARTER = D_HEAD // 2
VARIANTS: dict[str, dict[str, Any]] = {
    "FalconForCausalLM:many-heads": {"multi_query": False},
    "FalconForCausalLM:rw": {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    "FalconForCausalLM:new-decoder": {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "Phi3ForCausalLM:longrope": {
        "original_max_position_embeddings": 24,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": CONTEXT / 24,
            "short_factor": [1.0] * _QUARTER,
            "long_factor": [2.0, 3.0, 4.0, 5.0][:_QUARTER],
            "original_max_position_embeddings": 24,
        },
    },
    "LlamaForCausalLM:dynamic": {
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "LlamaForCausalLM:yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "LlamaForCausalLM:llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "Gemma3ForCausalLM:bidirectional": {"layer_types": _MIXED, "use_bidirectional_attention": True},
    "Gemma4ForCausalLM:shared-keys": {
        "num_hidden_layers": 4,
        "layer_types": [_SLIDING, _FULL] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": D_HEAD,
    },
    "Gemma4ForCausalLM:experts": {**_GEMMA4, "enable_moe_block": True},
    "GraniteMoeHybridForCausalLM:nope": {**_MAMBA, "position_embedding_type": "nope"},
    "Qwen2ForCausalLM:sliding": {"use_sliding_window": True, "max_window_layers": 1},
    "GPT2LMHeadModel:scaled": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "GPTBigCodeForCausalLM:many-heads": {"multi_query": False},
    "GPTNeoXForCausalLM:sequential": {"use_parallel_residual": False},
    "StableLmForCausalLM:parallel": {"use_parallel_residual": True},
    "OPTForCausalLM:post-norm": {"do_layer_norm_before": False},
    "BertLMHeadModel:decoder": {"is_decoder": True},
}
"""Of classes whose settings change the computation."""

NO_ADAPTER = _of("DistilBertForMaskedLM ModernBertForMaskedLM ElectraForCausalLM AlbertForMaskedLM PhimoeForCausalLM")
"""Known to transformers, not to TransformerLens."""
