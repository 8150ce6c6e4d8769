// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>
#include "places.h"

bool places_open(struct places *places, uint32_t room)
{
	pthread_mutex_init(&places->lock, NULL);
	places->free = calloc(room, sizeof(*places->free));
	places->room = room;
	places->first = places->count = 0;
	return places->free != NULL;
}

void places_close(struct places *places)
{
	free(places->free);
	places->free = NULL;
}

void places_clear(struct places *places)
{
	places->first = places->count = 0;
}

bool places_take(struct places *places, uint32_t *place)
{
	bool is_taken;

	pthread_mutex_lock(&places->lock);
	is_taken = places->count > 0;
	if (is_taken) {
		*place = places->free[places->first];
		places->first = (places->first + 1) % places->room;
		places->count--;
	}
	pthread_mutex_unlock(&places->lock);
	return is_taken;
}

void places_give_back(struct places *places, uint32_t place)
{
	pthread_mutex_lock(&places->lock);
	places->free[(places->first + places->count) % places->room] = place;
	places->count++;
	pthread_mutex_unlock(&places->lock);
}
