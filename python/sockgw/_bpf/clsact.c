// SPDX-License-Identifier: Apache-2.0
/*
 * Filters at the ingress of interfaces, where the kernel has no TCX links (before
 * 6.6). A link goes with the process that holds it, a filter stays. So it has to
 * say whose it is, and whoever finds it must be able to tell whether that gateway
 * lives: a gateway has a number in its network namespace, for as long as it holds an
 * abstract socket (those belong to the namespace, too) by that number's name, and the
 * number is in the handles of its filters.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include "shim.h"

/* A handle: "so", two flags, the gateway's number. */
#define MARK 0x736f0000U
#define MARK_MASK 0xffff0000U
#define PERSISTS SGW_CLSACT_PERSISTS
#define OWNS_QDISC 0x4000U /* it was made for a filter of ours */
#define NUMBER_MASK 0x0fffU

/* Packets that are translated are gone before others' filters could act on what they
 * were, and what others made of them would no longer be known: so the first
 * priority. Where others have it with filters of our kind, ours runs behind
 * theirs, and sees what they let go on (TC_ACT_UNSPEC): what it does not see stays
 * on splice. Where they have it with another kind, the next is tried.
 */
#define PRIORITY_FIRST 1
#define PRIORITY_LAST 65535
#define PRIORITIES 16

#define ANSWER_BYTES 32768
#define FILTERS_MAX 32 /* of ours at one interface */
#define ATTEMPTS 3
#define LOCK_WAITS 2000
#define LOCK_WAIT_US 1000

#define TC_PARENT(minor) TC_H_MAKE(TC_H_CLSACT, minor)

struct filter {
	uint32_t handle;
	uint32_t priority;
};

struct listing {
	bool is_empty; /* nobody has a filter there */
	int count;
	struct filter ours[FILTERS_MAX];
};

/* --- names */

static int hold_name(const char *name)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	socklen_t length;

	if (fd < 0)
		return -errno;
	length =
		offsetof(struct sockaddr_un, sun_path) + 1 +
		(socklen_t)snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "%s", name);
	if (bind(fd, (struct sockaddr *)&address, length)) {
		int error = errno;

		close(fd);
		return -error;
	}
	return fd;
}

static int hold_number(uint32_t number)
{
	char name[32];

	snprintf(name, sizeof(name), "sockgw-clsact-%u", number);
	return hold_name(name);
}

static bool is_alive(uint32_t number)
{
	int fd = hold_number(number);

	if (fd >= 0)
		close(fd);
	return fd < 0;
}

/* One gateway at a time looks whether a qdisc is empty and removes it, or adds a filter.
 * Whoever keeps the name for seconds is none: we go on without.
 */
static int lock(void)
{
	int fd = -1, i;

	for (i = 0; i < LOCK_WAITS && fd < 0; i++) {
		fd = hold_name("sockgw-clsact");
		if (fd < 0)
			usleep(LOCK_WAIT_US);
	}
	return fd;
}

static void unlock(int fd)
{
	if (fd >= 0)
		close(fd);
}

/* --- what is there */

static bool is_of_kind(const struct rtattr *kind, const char *name)
{
	return kind && RTA_PAYLOAD(kind) == strlen(name) + 1 && !strcmp(RTA_DATA(kind), name);
}

static void note(const struct nlmsghdr *message, struct listing *listing)
{
	const struct tcmsg *tc = NLMSG_DATA(message);
	const struct rtattr *attribute = TCA_RTA(tc);
	unsigned int bytes = message->nlmsg_len - NLMSG_LENGTH(sizeof(*tc));

	listing->is_empty = false;
	if ((tc->tcm_handle & MARK_MASK) != MARK || listing->count == FILTERS_MAX)
		return;
	for (; RTA_OK(attribute, bytes); attribute = RTA_NEXT(attribute, bytes))
		if (attribute->rta_type == TCA_KIND && is_of_kind(attribute, "bpf"))
			listing->ours[listing->count++] = (struct filter){
				.handle = tc->tcm_handle,
				.priority = TC_H_MAJ(tc->tcm_info) >> 16,
			};
}

/* Add what is at one side of an interface: 0 or -errno. */
static int list_side(int ifindex, uint32_t parent, struct listing *listing)
{
	struct {
		struct nlmsghdr header;
		struct tcmsg tc;
	} request = {
		.header = {
			.nlmsg_len = sizeof(request),
			.nlmsg_type = RTM_GETTFILTER,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP,
		},
		.tc = { .tcm_family = AF_UNSPEC, .tcm_ifindex = ifindex, .tcm_parent = parent },
	};
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), error = 0;
	char answer[ANSWER_BYTES] __attribute__((aligned(8)));
	bool is_done = false;

	if (fd < 0 || send(fd, &request, sizeof(request), 0) < 0)
		error = -errno;
	while (!error && !is_done) {
		const struct nlmsghdr *message = (const struct nlmsghdr *)answer;
		ssize_t received = recv(fd, answer, sizeof(answer), 0);
		unsigned int bytes = received > 0 ? (unsigned int)received : 0;

		if (received < 0 && errno != EINTR)
			error = -errno;
		for (; NLMSG_OK(message, bytes) && !is_done; message = NLMSG_NEXT(message, bytes)) {
			if (message->nlmsg_type == RTM_NEWTFILTER)
				note(message, listing);
			else if (message->nlmsg_type == NLMSG_ERROR)
				error = ((const struct nlmsgerr *)NLMSG_DATA(message))->error;
			is_done = message->nlmsg_type == NLMSG_DONE ||
				  message->nlmsg_type == NLMSG_ERROR;
		}
	}
	if (fd >= 0)
		close(fd);
	return error;
}

static int list(int ifindex, struct listing *listing)
{
	listing->is_empty = true;
	listing->count = 0;
	return list_side(ifindex, TC_PARENT(TC_H_MIN_INGRESS), listing);
}

/* --- taking a number */

static uint32_t number_of(const struct filter *filter)
{
	return filter->handle & NUMBER_MASK;
}

static bool is_owned_by(const struct filter *filter, uint32_t owner)
{
	return (filter->handle & (PERSISTS | NUMBER_MASK)) == owner;
}

static int remove_filter(int ifindex, const struct filter *filter)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS);
	LIBBPF_OPTS(bpf_tc_opts, options, .handle = filter->handle, .priority = filter->priority);

	return bpf_tc_detach(&hook, &options);
}

/* Unless somebody has a filter there. */
static void remove_qdisc(int ifindex)
{
	LIBBPF_OPTS(bpf_tc_hook, both, .ifindex = ifindex,
		    .attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS);
	struct listing listing;

	if (!list(ifindex, &listing) && !list_side(ifindex, TC_PARENT(TC_H_MIN_EGRESS), &listing) &&
	    listing.is_empty)
		bpf_tc_hook_destroy(&both);
}

/* Remove the filters of a gateway; or, without one, those of all that have died and did not
 * mean to leave any. Then the qdisc, if we made it and nobody has a filter there.
 */
static int remove_at(int ifindex, uint32_t owner)
{
	struct listing before;
	bool was_ours = false;
	int removed = 0, i;

	if (list(ifindex, &before))
		return 0;
	for (i = 0; i < before.count; i++) {
		const struct filter *filter = &before.ours[i];

		if (owner ? !is_owned_by(filter, owner) :
			    filter->handle & PERSISTS || is_alive(number_of(filter)))
			continue;
		if (remove_filter(ifindex, filter))
			continue;
		removed++;
		was_ours |= (filter->handle & OWNS_QDISC) != 0;
	}
	if (was_ours)
		remove_qdisc(ifindex);
	return removed;
}

static int remove_everywhere(uint32_t owner)
{
	struct if_nameindex *interfaces = if_nameindex();
	int removed = 0, i;

	for (i = 0; interfaces && interfaces[i].if_index; i++)
		removed += remove_at((int)interfaces[i].if_index, owner);
	if (interfaces)
		if_freenameindex(interfaces);
	return removed;
}

/* Whether somebody who is to come back for them has filters by this number. */
static bool is_reserved(uint32_t number)
{
	struct if_nameindex *interfaces = if_nameindex();
	bool is_found = false;
	struct listing listing;
	int i, j;

	for (i = 0; interfaces && interfaces[i].if_index && !is_found; i++)
		if (!list((int)interfaces[i].if_index, &listing))
			for (j = 0; j < listing.count; j++)
				is_found |= is_owned_by(&listing.ours[j], PERSISTS | number);
	if (interfaces)
		if_freenameindex(interfaces);
	return is_found;
}

int sgw_clsact_take(uint32_t *owner)
{
	uint32_t number = *owner & NUMBER_MASK, flags = *owner & PERSISTS;
	int guard = lock(), fd = -EBUSY;

	if (number)
		fd = hold_number(number);
	for (number = number ? number : 1; fd == -EBUSY && number <= NUMBER_MASK;) {
		if (!is_reserved(number))
			fd = hold_number(number);
		if (fd == -EADDRINUSE)
			fd = -EBUSY;
		if (fd == -EBUSY)
			number++;
	}
	/* Not ours yet, by now: what is there by this number is a dead one's, too. */
	if (fd >= 0) {
		remove_everywhere(number);
		remove_everywhere(0);
		*owner = flags | number;
	}
	unlock(guard);
	return fd;
}

/* --- attaching */

static int attach_once(uint32_t owner, int program, int ifindex, bool is_first)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS);
	uint32_t handle = MARK | owner;
	bool is_made = !bpf_tc_hook_create(&hook); /* EEXIST: it is somebody's, or ours */
	struct listing listing;
	int error = list(ifindex, &listing), i;

	if (error)
		return error;
	for (i = 0; i < listing.count; i++)
		if (listing.ours[i].handle & OWNS_QDISC)
			is_made = true; /* for another filter; the last one removes it */
	if (is_made)
		handle |= OWNS_QDISC;
	error = -EINVAL;
	/* EINVAL: somebody has another kind of filter at this priority. */
	for (i = 0; i < PRIORITIES && error == -EINVAL; i++) {
		uint32_t priority = (uint32_t)(is_first ? PRIORITY_FIRST + i : PRIORITY_LAST - i);
		LIBBPF_OPTS(bpf_tc_opts, options, .prog_fd = program, .handle = handle,
			    .priority = priority, .flags = BPF_TC_F_REPLACE);

		error = bpf_tc_attach(&hook, &options);
	}
	if (error && is_made)
		remove_qdisc(ifindex);
	return error;
}

/* Have a filter that the gateway's predecessor left run this program: nothing passes by
 * between the two.
 */
static int replace(uint32_t owner, int program, int ifindex, bool is_first)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS);
	struct listing listing;
	int error = list(ifindex, &listing), i;

	for (i = 0; !error && i < listing.count; i++) {
		const struct filter *filter = &listing.ours[i];
		LIBBPF_OPTS(bpf_tc_opts, options, .prog_fd = program, .handle = filter->handle,
			    .priority = filter->priority, .flags = BPF_TC_F_REPLACE);

		if (is_owned_by(filter, owner) &&
		    (filter->priority <= PRIORITY_LAST - PRIORITIES) == is_first)
			return bpf_tc_attach(&hook, &options);
	}
	return error ? error : -ENOENT;
}

int sgw_clsact_attach(uint32_t owner, int program, int ifindex, bool is_first)
{
	int guard = lock(), error = replace(owner, program, ifindex, is_first), i;

	/* EINVAL, ENOENT: the qdisc went away between. */
	for (i = 0; i < ATTEMPTS && (error == -ENOENT || error == -EINVAL); i++)
		error = attach_once(owner, program, ifindex, is_first);
	unlock(guard);
	return error;
}

int sgw_clsact_remove(uint32_t owner)
{
	int guard = lock(), removed = remove_everywhere(owner);

	unlock(guard);
	return removed;
}
