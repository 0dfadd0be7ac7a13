/* A libnvidia-ml.so.1 of two cards, for tests. WITHOUT_ENERGY and WITHOUT_POWER leave those counters out, as old cards
 * and virtual ones do. */
#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, NOT_FOUND = 6, NOT_SUPPORTED = 3 };

struct card {
    const char *uuid, *place;
    unsigned busy_percent, milliwatts, celsius;
    unsigned long long millijoules;
};

static struct card cards[] = {
    {"GPU-one", "0000:17:00.0", 30, 300000, 55, 7000000},
    {"GPU-two", "0000:65:00.0", 60, 400000, 66, 9000000},
};

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetHandleByUUID(const char *uuid, struct card **card) {
    for (int i = 0; i < 2; i++) {
        if (strcmp(cards[i].uuid, uuid) == 0) {
            *card = &cards[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *place, struct card **card) {
    for (int i = 0; i < 2; i++) {
        if (strcmp(cards[i].place, place) == 0) {
            *card = &cards[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUtilizationRates(struct card *card, unsigned *gpu_and_memory) {
    gpu_and_memory[0] = card->busy_percent;
    gpu_and_memory[1] = 10;
    return SUCCESS;
}

struct memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(struct card *card, struct memory *memory) {
    unsigned long long gib = 1ull << 30;
    memory->total = 141 * gib;
    memory->reserved = gib;
    memory->used = 20 * gib;
    memory->free = 120 * gib;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(struct card *card, unsigned *milliwatts) {
#ifdef WITHOUT_POWER
    return NOT_SUPPORTED;
#endif
    *milliwatts = card->milliwatts;
    return SUCCESS;
}

#ifndef WITHOUT_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(struct card *card, unsigned long long *millijoules) {
    card->millijoules += 80000;
    *millijoules = card->millijoules;
    return SUCCESS;
}
#endif

int nvmlDeviceGetTemperature(struct card *card, int sensor, unsigned *celsius) {
    *celsius = card->celsius;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(struct card *card, int clock, unsigned *mhz) {
    *mhz = 1755;
    return SUCCESS;
}
