/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the direct programs and userspace share; read by cffi, too. A session has
 * two directions, numbered as sockmap.h numbers them. An *application's* socket is
 * the other end of one of our two.
 */
#ifndef SOCKGW_DIRECT_H
#define SOCKGW_DIRECT_H

/* Sizes that userspace raises before the object is loaded. */
#define DIRECT_SLOTS_DEFAULT 2
#define DIRECT_WORKERS_MAX 256

/* Of connections that are being set up; older ones make room. */
#define DIRECT_BIRTHS 8192

/* What a message takes in its receiver's queue besides its bytes (struct sk_msg). */
#define DIRECT_MESSAGE_BYTES 1024

/* Why the bytes of a direction stay on TCP for good. */
enum direct_refusal {
	DIRECT_FITS,
	DIRECT_BLOCKS, /* its receiver waits in recv() */
	DIRECT_WAITS_FOR_ALL, /* its receiver uses MSG_WAITALL or SO_RCVLOWAT */
	DIRECT_PEEKS, /* its receiver uses SO_PEEK_OFF */
	DIRECT_ZEROCOPY, /* its sender uses SO_ZEROCOPY */
	DIRECT_TAKEN, /* another product has one of the sockets, or it has no room here */
};

/* The words of one direction. The counters are never reset: a sum over all slots
 * only ever grows.
 */
struct direct_slot {
	/* Written by sock_direct, under the sender's lock. */
	__u64 bytes; /* handed to the receiver's queue */
	__u64 messages;
	__u64 passed_messages; /* left to TCP, of a direction that is paired */
	__u64 older_end; /* bytes, at the end of the older of two lots of messages */
	__u32 older_messages; /* of that lot, if not all of it has been read */
	__u32 newer_messages; /* sent since */
	__u32 program_pad[6];

	/* Written by what runs on the receiver's side, and by sock_direct_ask. */
	__u64 sender; /* cookies of the two applications' sockets */
	__u64 receiver;
	__u32 refusal; /* enum direct_refusal; the first one stays */
	__u32 was_cut; /* the receiver was closed with bytes unread: to TCP that is a reset */
	__u32 is_told; /* that the direction may be opened */
	__u32 has_read; /* the receiver, if only once */
	__u32 read_to; /* its copied_seq, when its last recv() returned */

	/* Written by userspace. */
	__u32 is_awaited; /* somebody waits until the receiver has read everything */
	__u32 userspace_pad[6];
};

enum direct_question {
	DIRECT_WATCH, /* find both applications' sockets: are they there? */
	DIRECT_OPEN, /* let what the direction's sender sends go direct */
	DIRECT_LOOK, /* is anything unread in the queue of the direction's receiver? */
	DIRECT_FORGET, /* the session is over: the sender is on TCP again */
};

enum direct_answer {
	DIRECT_NO,
	DIRECT_YES,
	DIRECT_NOT_YET,
};

/* What sock_direct_ask is asked. */
struct direct_ask {
	__u32 question;
	__u32 slot; /* DIRECT_WATCH: the session's first */
	__u64 client; /* DIRECT_WATCH: cookies of our two sockets */
	__u64 backend;
	__u32 worker; /* DIRECT_WATCH: whose ring hears of the session */
	__u32 pad;
};

/* Value of direct_found, by the cookie of a socket of ours. */
struct direct_found {
	__u64 application; /* cookie of the socket at its other end */
	__u64 address; /* of its own struct sock */
};

/* Key of direct_listeners: where we listen. */
struct direct_listener {
	__u64 netns; /* cookie */
	__u32 port; /* host order */
	__u32 pad;
};

/* Its value: all zero is any address; IPv4 as ::ffff:a.b.c.d. */
struct direct_address {
	__u32 words[4];
};

/* Record of a direct ring: have a look at this direction. */
struct direct_event {
	__u32 slot;
};

#endif
