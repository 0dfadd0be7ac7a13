// What llama.cpp itself makes of a GGUF file: the token ids of each prompt, the logits at its last
// position and a greedy continuation, as JSON. generate.py compiles and runs it.
//
//   reference MODEL N_CTX N_NEW ADAPTER|- SCALE PROMPT...
//
// One thread, KV cache in f32, no flash attention, no repacked weights; the end of sequence is ignored.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const char * what) {
    fprintf(stderr, "reference: %s\n", what);
    exit(1);
}

static void print_ids(const char * key, const std::vector<llama_token> & ids) {
    printf("\"%s\":[", key);
    for (size_t i = 0; i < ids.size(); i++) printf("%s%d", i ? "," : "", ids[i]);
    printf("]");
}

int main(int argc, char ** argv) {
    if (argc < 7) fail("arguments are missing");
    const int n_ctx = atoi(argv[2]), n_new = atoi(argv[3]);
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR || getenv("VERBOSE")) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();

    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    mp.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) fail("the model does not load");

    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = cp.n_batch = cp.n_ubatch = n_ctx;
    cp.n_threads = cp.n_threads_batch = 1;
    cp.type_k = cp.type_v = GGML_TYPE_F32;
    cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * ctx = llama_init_from_model(model, cp);
    if (!ctx) fail("no context");
    if (std::string(argv[4]) != "-") {
        llama_adapter_lora * adapter = llama_adapter_lora_init(model, argv[4]);
        if (!adapter) fail("the adapter does not load");
        float scale = atof(argv[5]);
        if (llama_set_adapters_lora(ctx, &adapter, 1, &scale)) fail("the adapter does not fit");
    }

    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int n_vocab = llama_vocab_n_tokens(vocab);
    printf("{\"n_ctx\":%d,\"vocab_size\":%d,\"prompts\":[", n_ctx, n_vocab);
    for (int a = 6; a < argc; a++) {
        const std::string text = argv[a];
        std::vector<llama_token> ids(text.size() + 8);
        const int n = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), true, false);
        if (n <= 0) fail("a prompt has no tokens");
        ids.resize(n);
        llama_memory_clear(llama_get_memory(ctx), true);
        printf("%s{", a > 6 ? "," : "");
        print_ids("prompt_token_ids", ids);

        std::vector<llama_token> step = ids, greedy;
        double min_margin = 1e30;
        while ((int) greedy.size() < n_new) {
            if (llama_decode(ctx, llama_batch_get_one(step.data(), step.size()))) fail("decode");
            const float * logits = llama_get_logits_ith(ctx, -1);
            if (greedy.empty()) {
                printf(",\"last_logits\":[");
                for (int i = 0; i < n_vocab; i++) printf("%s%.9g", i ? "," : "", logits[i]);
                printf("]");
            }
            const int best = std::max_element(logits, logits + n_vocab) - logits;
            for (int i = 0; i < n_vocab; i++) {
                if (i != best) min_margin = std::min(min_margin, (double) logits[best] - logits[i]);
            }
            greedy.push_back(best);
            step = {best};
        }
        printf(",");
        print_ids("greedy", greedy);
        printf(",\"min_margin\":%.4g}", min_margin);
    }
    printf("]}\n");
    return 0;
}
