// SPDX-License-Identifier: Apache-2.0
/*
 * The direct path as userspace sees it: what the loop asks for its sessions, and
 * sockgw.direct for those that Python has.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "places.h"
#include "shim.h"

struct sgw_direct {
	struct sgw_direct_settings settings;
	struct places places;
	struct sgw_direct_way *ways; /* by slot, of all processes */
};

static int ask_program(const struct sgw_direct *direct, const struct direct_ask *ask)
{
	LIBBPF_OPTS(bpf_test_run_opts, run, .data_in = ask, .data_size_in = sizeof(*ask),
		    .repeat = 1);
	int err = bpf_prog_test_run_opts(direct->settings.program, &run);

	return err < 0 ? err : (int)run.retval;
}

int sgw_direct_ask(const struct sgw_direct *direct, enum direct_question question, uint32_t slot)
{
	struct direct_ask ask = { .question = question, .slot = slot };

	return ask_program(direct, &ask);
}

static void set_free(struct sgw_direct *direct)
{
	const struct sgw_direct_settings *settings = &direct->settings;
	uint32_t id;

	places_clear(&direct->places);
	for (id = settings->first; id < settings->first + settings->sessions; id++)
		places_give_back(&direct->places, id);
}

struct sgw_direct *sgw_direct_open(const struct sgw_direct_settings *settings)
{
	struct sgw_direct *direct = calloc(1, sizeof(*direct));

	if (!direct)
		return NULL;
	direct->settings = *settings;
	/* Zeroed pages: what is never used takes no memory. */
	direct->ways = calloc(settings->sessions, SOCK_SLOTS_PER_SESSION * sizeof(*direct->ways));
	if (!direct->ways || !places_open(&direct->places, settings->sessions)) {
		sgw_direct_close(direct);
		return NULL;
	}
	set_free(direct);
	return direct;
}

void sgw_direct_narrow(struct sgw_direct *direct, uint32_t first, uint32_t sessions)
{
	direct->settings.first = first;
	direct->settings.sessions = sessions;
	set_free(direct);
}

void sgw_direct_close(struct sgw_direct *direct)
{
	places_close(&direct->places);
	free(direct->ways);
	free(direct);
}

uint32_t sgw_direct_active(const struct sgw_direct *direct)
{
	return direct->settings.sessions - direct->places.count;
}

struct direct_slot *sgw_direct_words(const struct sgw_direct *direct, uint32_t slot)
{
	return &direct->settings.slots[slot];
}

struct sgw_direct_way *sgw_direct_way(const struct sgw_direct *direct, uint32_t slot)
{
	return &direct->ways[slot];
}

/* Begin at the words' present values. */
static void begin(const struct sgw_direct *direct, uint32_t slot)
{
	struct direct_slot *words = sgw_direct_words(direct, slot);
	struct sgw_direct_way *way = sgw_direct_way(direct, slot);

	words->older_end = words->bytes;
	words->older_messages = words->newer_messages = 0;
	words->sender = words->receiver = 0;
	words->refusal = words->was_cut = words->is_told = words->has_read = words->read_to = 0;
	words->is_awaited = 0;
	way->before = way->flushed_at = words->bytes;
	way->is_counted = false;
}

int sgw_direct_watch(struct sgw_direct *direct, int client, int backend, uint32_t worker,
		     uint32_t *id)
{
	struct direct_ask ask = {
		.question = DIRECT_WATCH,
		.client = sgw_cookie(client),
		.backend = sgw_cookie(backend),
		.worker = worker,
	};
	int answer;

	if (!places_take(&direct->places, id))
		return -ENOSPC;
	ask.slot = *id * SOCK_SLOTS_PER_SESSION;
	begin(direct, ask.slot | SOCK_SLOT_TO_BACKEND);
	begin(direct, ask.slot | SOCK_SLOT_TO_CLIENT);
	answer = ask_program(direct, &ask);
	if (answer != DIRECT_YES)
		places_give_back(&direct->places, *id);
	return answer;
}

void sgw_direct_forget(struct sgw_direct *direct, uint32_t id)
{
	uint32_t slot = id * SOCK_SLOTS_PER_SESSION, way;

	for (way = 0; way < SOCK_SLOTS_PER_SESSION; way++) {
		sgw_direct_ask(direct, DIRECT_FORGET, slot | way);
		sgw_direct_words(direct, slot | way)->sender = 0;
	}
	places_give_back(&direct->places, id);
}

bool sgw_direct_is_overtaken(const struct sgw_direct *direct, uint32_t slot)
{
	return __atomic_load_n(&sgw_direct_words(direct, slot)->bytes, __ATOMIC_ACQUIRE) !=
	       sgw_direct_way(direct, slot)->flushed_at;
}

int sgw_direct_is_flushed(const struct sgw_direct *direct, uint32_t slot)
{
	struct direct_slot *words = sgw_direct_words(direct, slot);
	uint64_t handed_over;
	int answer;

	/* Set before the look: a recv() that is not seen by it sees this. */
	__atomic_store_n(&words->is_awaited, 1, __ATOMIC_SEQ_CST);
	handed_over = words->bytes;
	answer = sgw_direct_ask(direct, DIRECT_LOOK, slot);
	if (answer == DIRECT_YES)
		return 0;
	if (answer < 0)
		return answer;
	words->is_awaited = 0;
	sgw_direct_way(direct, slot)->flushed_at = handed_over;
	return 1;
}

void sgw_direct_totals(const struct direct_slot *slots, size_t count,
		       struct sgw_direct_totals *totals)
{
	size_t i;

	memset(totals, 0, sizeof(*totals));
	for (i = 0; i < count; i++) {
		totals->bytes[i % SOCK_SLOTS_PER_SESSION] += slots[i].bytes;
		totals->messages += slots[i].messages;
		totals->passed_messages += slots[i].passed_messages;
	}
}

static void take_all_out(int map)
{
	uint64_t cookie;

	while (!bpf_map_get_next_key(map, NULL, &cookie)) {
		int err = bpf_map_delete_elem(map, &cookie);

		if (err && err != -ENOENT) /* closed meanwhile: so be it */
			return;
	}
}

void sgw_direct_guard(int senders_map, int sockets_map, int alive)
{
	int kept[] = { alive, senders_map, sockets_map };
	char byte;

	prctl(PR_SET_NAME, "sockgw-guard");
	sgw_close_all_but(kept, sizeof(kept) / sizeof(*kept));
	while (read(alive, &byte, 1) < 0 && errno == EINTR)
		;
	take_all_out(senders_map);
	take_all_out(sockets_map);
	_exit(0);
}
