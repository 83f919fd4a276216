"""The environment variables of every process that makes an engine."""

ENGINE = {
    "HF_HUB_OFFLINE": "1",
    # The tests read the scheduler, so that it must be in their process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
