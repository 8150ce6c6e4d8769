/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The places of a map that no session has. First in, first out: one rests as long as it
 * can before its reuse. The loops of a process share them.
 */
#ifndef SOCKGW_PLACES_H
#define SOCKGW_PLACES_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct places {
	pthread_mutex_t lock; /* guards what follows */
	uint32_t *free;
	uint32_t room;
	uint32_t first;
	uint32_t count;
};

/* None is free yet. false: no memory. */
bool places_open(struct places *places, uint32_t room);
void places_close(struct places *places);
/* Forget which are free: a forked process's copy is about others. */
void places_clear(struct places *places);
bool places_take(struct places *places, uint32_t *place);
void places_give_back(struct places *places, uint32_t place);

#endif
