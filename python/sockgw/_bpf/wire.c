// SPDX-License-Identifier: Apache-2.0
/*
 * The wire path, userspace's part: which sessions may go by wire, how our sockets
 * leave one that does, and how it is ended from here. The program decides when
 * (bpf/wire.bpf.c); whose session it is, the loop knows (wired.c).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/icmp6.h>
#include <netinet/ip6.h>
#include <netinet/ip_icmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/io_uring.h>
#include <linux/rtnetlink.h>
#include <linux/tcp.h>
#include "places.h"
#include "wire_calls.h"

#define LEG_CLIENT SOCK_SLOT_TO_BACKEND /* a leg has the number of the way that it feeds */
#define LEG_BACKEND SOCK_SLOT_TO_CLIENT
#define FRESH_TTL 64

#define LEAST_WINDOW 32768
#define LOOPBACK_IFINDEX 1 /* in every network namespace */

/* Of newer kernels than Debian 12's headers: linux/tcp.h (6.7), linux/in.h (6.3). */
#define OPT_USEC_TS 64
#define LOCAL_PORT_RANGE 51

_Static_assert(SGW_WIRE_WORKERS == WIRE_WORKERS_MAX, "wire.h");
_Static_assert(SGW_UNFITS > WIRE_NOT_ESTABLISHED, "wire.h");

struct sgw_wire {
	struct sgw_wire_settings settings;
	int raw4; /* they send resets, and receive nothing */
	int raw6;
	struct places places;
};

/* --- sessions in the maps */

struct wire_slot *wire_slot(const struct sgw_wire *wire, uint32_t id, uint32_t way)
{
	return &wire->settings.slots[(size_t)id * WIRE_WAYS + way];
}

static bool look_up(const struct sgw_wire *wire, uint32_t id, struct wire_session *session)
{
	return !bpf_map_lookup_elem_flags(wire->settings.sessions_map, &id, session, BPF_F_LOCK);
}

static void set_free(struct sgw_wire *wire)
{
	struct wire_session session;
	uint32_t i;

	places_clear(&wire->places);
	for (i = 0; i < wire->settings.sessions; i++) {
		uint32_t id = wire->settings.first + i;

		/* Another gateway's that has died; sgw_loop_adopt() sees to it. */
		if (wire->settings.is_inherited && wire_find(wire, id, &session) != WIRE_FREE)
			continue;
		places_give_back(&wire->places, id);
	}
}

uint32_t wire_first(const struct sgw_wire *wire)
{
	return wire->settings.first;
}

uint32_t wire_sessions(const struct sgw_wire *wire)
{
	return wire->settings.sessions;
}

static void set_state(const struct sgw_wire *wire, uint32_t id, struct wire_session *session,
		      enum wire_state state)
{
	session->state = state;
	bpf_map_update_elem(wire->settings.sessions_map, &id, session, BPF_F_LOCK);
}

/* Unless they are another session's by now. */
static void delete_flows(const struct sgw_wire *wire, uint32_t id,
			 const struct wire_session *session)
{
	struct wire_leg leg;
	uint32_t way;

	for (way = 0; way < WIRE_WAYS; way++)
		if (!bpf_map_lookup_elem(wire->settings.flows_map, &session->flows[way], &leg) &&
		    leg.session == id && leg.generation == session->generation)
			bpf_map_delete_elem(wire->settings.flows_map, &session->flows[way]);
}

/* The program may be about to end the session, too: one of us does. */
static bool claim(const struct sgw_wire *wire, uint32_t id)
{
	uint32_t nobody = 0;

	return __atomic_compare_exchange_n(&wire_slot(wire, id, 0)->is_claimed, &nobody, 1, false,
					   __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* --- arming */

/* One side of a flow: 0, or why it cannot be one. */
static enum wire_unfit read_side(const struct sockaddr_in6 *address, uint32_t *host, uint16_t *port,
				 uint32_t *family)
{
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;

	memset(host, 0, 16);
	*port = address->sin6_port;
	if (address->sin6_family == AF_INET) {
		*family = AF_INET;
		host[0] = v4->sin_addr.s_addr;
	} else if (IN6_IS_ADDR_V4MAPPED(&address->sin6_addr)) {
		*family = AF_INET;
		host[0] = address->sin6_addr.s6_addr32[3];
	} else {
		*family = AF_INET6;
		memcpy(host, &address->sin6_addr, 16);
		if (IN6_IS_ADDR_LINKLOCAL(&address->sin6_addr))
			return WIRE_LINK_LOCAL;
	}
	return WIRE_FITS;
}

static enum wire_unfit read_flow(int fd, struct wire_flow *flow)
{
	struct sockaddr_in6 peer, own;
	socklen_t peer_length = sizeof(peer), own_length = sizeof(own);
	enum wire_unfit unfit;

	if (getpeername(fd, (struct sockaddr *)&peer, &peer_length) ||
	    getsockname(fd, (struct sockaddr *)&own, &own_length))
		return WIRE_NOT_ESTABLISHED;
	unfit = read_side(&peer, flow->source, &flow->source_port, &flow->family);
	return unfit ? unfit : read_side(&own, flow->target, &flow->target_port, &flow->family);
}

/* What the two connections have agreed on must be the same. */
static enum wire_unfit compare(const struct tcp_info *client, const struct tcp_info *backend)
{
	uint8_t differs = client->tcpi_options ^ backend->tcpi_options;

	if (client->tcpi_state != BPF_TCP_ESTABLISHED || backend->tcpi_state != BPF_TCP_ESTABLISHED)
		return WIRE_NOT_ESTABLISHED;
	/* Those in microseconds (a route's feature) are another clock than ours. */
	if (differs & TCPI_OPT_TIMESTAMPS ||
	    (client->tcpi_options | backend->tcpi_options) & OPT_USEC_TS)
		return WIRE_TIMESTAMPS;
	if (differs & TCPI_OPT_WSCALE)
		return WIRE_WINDOW_SCALING;
	if (differs & TCPI_OPT_SACK)
		return WIRE_SACK;
	return differs & TCPI_OPT_ECN ? WIRE_ECN : WIRE_FITS;
}

/* Our listener and our calls ask for plain TCP; a wrapper (mptcpize) may have changed that. */
static bool is_multipath(int fd)
{
	socklen_t length = sizeof(int);
	int protocol;

	return !getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length) &&
	       protocol == IPPROTO_MPTCP;
}

static enum wire_unfit read_session(const int *fds, struct wire_session *session)
{
	struct tcp_info info[WIRE_WAYS] = { 0 };
	enum wire_unfit unfit;
	uint32_t leg;

	for (leg = 0; leg < WIRE_WAYS; leg++) {
		socklen_t length = sizeof(info[leg]);

		if (is_multipath(fds[leg]))
			return WIRE_MPTCP;
		if (getsockopt(fds[leg], IPPROTO_TCP, TCP_INFO, &info[leg], &length))
			return WIRE_NOT_ESTABLISHED;
	}
	unfit = compare(&info[LEG_CLIENT], &info[LEG_BACKEND]);
	for (leg = 0; leg < WIRE_WAYS && !unfit; leg++) {
		session->peer_scale[leg] = info[leg].tcpi_snd_wscale;
		session->own_scale[leg] = info[leg].tcpi_rcv_wscale;
		unfit = read_flow(fds[leg], &session->flows[leg]);
	}
	if (!unfit && session->flows[0].family != session->flows[1].family)
		unfit = WIRE_MIXED_FAMILIES;
	session->has_timestamps = (info[0].tcpi_options & TCPI_OPT_TIMESTAMPS) != 0;
	return unfit;
}

void wire_bound(const int *fds)
{
	int bytes = SGW_BUFFER_BYTES;
	uint32_t leg;

	for (leg = 0; leg < WIRE_WAYS; leg++)
		if (fds[leg] >= 0)
			setsockopt(fds[leg], SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes));
}

/* To be called before a clamp makes the rcv_ssthresh smaller. */
static void note_told(struct wire_slot *slot, uint32_t bytes)
{
	if (bytes > slot->most_told)
		slot->most_told = bytes;
}

static void clamp_window(int fd, int bytes)
{
	setsockopt(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, &bytes, sizeof(bytes));
}

void wire_fit_windows(const struct sgw_wire *wire, uint32_t id, const int *fds)
{
	struct tcp_info info[WIRE_WAYS] = { 0 };
	uint32_t leg;

	for (leg = 0; leg < WIRE_WAYS; leg++) {
		socklen_t length = sizeof(info[leg]);

		if (getsockopt(fds[leg], IPPROTO_TCP, TCP_INFO, &info[leg], &length))
			return;
		note_told(wire_slot(wire, id, leg), info[leg].tcpi_rcv_ssthresh);
	}
	/* What is announced is rounded up to the scale. A receiver with less than
	 * LEAST_WINDOW, or than a segment, is not for the wire, and need not slow the relay
	 * down, too.
	 */
	for (leg = 0; leg < WIRE_WAYS; leg++) {
		uint32_t window = info[!leg].tcpi_snd_wnd >> info[leg].tcpi_rcv_wscale
								     << info[leg].tcpi_rcv_wscale;
		uint32_t segment = WIRE_SEGMENT(wire_slot(wire, id, leg)->most_told,
						info[leg].tcpi_rcv_wscale, info[leg].tcpi_advmss);

		if (window >= LEAST_WINDOW && segment <= WIRE_SEGMENT_MOST(info[!leg].tcpi_snd_mss))
			clamp_window(fds[leg], (int)window);
	}
}

/* Let them be what such a buffer has by itself, and say so at once: a peer that has
 * filled its window need not hear of it before somebody reads, and until then may
 * acknowledge outside of it, in vain (relay.py, widen()). Leaving the repair mode
 * sends a window probe.
 */
static void free_windows(const int *fds)
{
	int on = 1, off = 0;
	uint32_t leg;

	for (leg = 0; leg < WIRE_WAYS; leg++) {
		clamp_window(fds[leg], SGW_BUFFER_BYTES);
		setsockopt(fds[leg], IPPROTO_TCP, TCP_REPAIR, &on, sizeof(on));
		setsockopt(fds[leg], IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off));
	}
	/* It leaves the socket without what it has inherited from the listener, which nobody
	 * could bind again then for as long as there is a trace of this connection.
	 */
	setsockopt(fds[SOCK_SLOT_TO_BACKEND], SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
}

enum wire_unfit wire_arm(struct sgw_wire *wire, const int *fds, uint32_t worker,
			 const uint32_t *told, uint32_t *id)
{
	struct wire_session session = { .state = WIRE_ARMED, .worker = worker };
	enum wire_unfit unfit = read_session(fds, &session);
	struct wire_slot *first;
	uint32_t way;

	if (unfit)
		return unfit;
	if (!places_take(&wire->places, id))
		return WIRE_NO_ROOM;
	for (way = 0; way < WIRE_WAYS; way++) {
		struct wire_slot *slot = wire_slot(wire, *id, way);

		slot->has_fin = slot->has_reset = slot->is_reused = 0;
		slot->route = 0;
		slot->is_too_long = 0;
		slot->most_told = told[way];
		slot->counted_before = slot->bytes;
	}
	session.generation = ++wire_slot(wire, *id, 0)->generation;
	if (bpf_map_update_elem(wire->settings.sessions_map, id, &session, BPF_F_LOCK))
		goto failed;
	/* Not before: a program may still be at the session that was here. */
	first = wire_slot(wire, *id, 0);
	first->fins_acked = first->is_claimed = first->is_chatty = 0;
	__atomic_store_n(&first->hold, 0, __ATOMIC_SEQ_CST);
	for (way = 0; way < WIRE_WAYS; way++) {
		struct wire_leg leg = {
			.session = *id,
			.generation = session.generation,
			.way = way,
		};

		if (bpf_map_update_elem(wire->settings.flows_map, &session.flows[way], &leg,
					BPF_NOEXIST)) {
			/* EEXIST: the same ports again, and the session that had
			 * them is not buried yet.
			 */
			delete_flows(wire, *id, &session);
			set_state(wire, *id, &session, WIRE_FREE);
			goto failed;
		}
	}
	wire_fit_windows(wire, *id, fds);
	return WIRE_FITS;
failed:
	places_give_back(&wire->places, *id);
	return WIRE_NO_ROOM;
}

bool wire_disarm(struct sgw_wire *wire, uint32_t id, const int *fds)
{
	struct wire_session session;

	/* The program reads hold under the lock that the look-up takes: either it
	 * has switched before, and the state says so, or it never will.
	 */
	__atomic_store_n(&wire_slot(wire, id, 0)->hold, 1, __ATOMIC_SEQ_CST);
	if (look_up(wire, id, &session)) {
		if (session.state == WIRE_SWITCHED || session.state == WIRE_ENDED)
			return false;
		delete_flows(wire, id, &session);
		set_state(wire, id, &session, WIRE_FREE);
	}
	places_give_back(&wire->places, id);
	if (fds)
		free_windows(fds);
	return true;
}

enum wire_state wire_find(const struct sgw_wire *wire, uint32_t id, struct wire_session *session)
{
	return look_up(wire, id, session) ? (enum wire_state)session->state : WIRE_FREE;
}

/* --- leaving */

socklen_t wire_write_side(struct sockaddr_in6 *address, const uint32_t *host, uint16_t port,
			  uint32_t family)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)address;

	memset(address, 0, sizeof(*address));
	address->sin6_family = (sa_family_t)family;
	address->sin6_port = port;
	if (family == AF_INET) {
		v4->sin_addr.s_addr = host[0];
		return sizeof(*v4);
	}
	memcpy(&address->sin6_addr, host, 16);
	return sizeof(*address);
}

static int repair(int fd)
{
	int on = 1;

	return setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &on, sizeof(on));
}

/* A socket that has the flow's ports and addresses and says nothing: it came to be
 * without a packet. As long as it is there, nobody on this host is given them.
 *
 * The port is not bound but chosen by connect(), from a range of one: a bound port
 * is not given to connections to other backends either.
 */
static int occupy(const struct wire_flow *flow)
{
	struct sockaddr_in6 own, peer;
	uint32_t port = ntohs(flow->target_port), range = port << 16 | port;
	int fd = socket((int)flow->family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP), on = 1;
	socklen_t length;

	if (fd < 0)
		return -1;
	if (setsockopt(fd, SOL_IP, LOCAL_PORT_RANGE, &range, sizeof(range)) ||
	    setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on)))
		port = 0; /* before 6.3 */
	length = wire_write_side(&own, flow->target, port ? 0 : flow->target_port, flow->family);
	wire_write_side(&peer, flow->source, flow->source_port, flow->family);
	if (repair(fd) || bind(fd, (struct sockaddr *)&own, length) ||
	    connect(fd, (struct sockaddr *)&peer, length)) {
		close(fd);
		return -1;
	}
	return fd;
}

static bool is_untouched(int fd, uint64_t received)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);

	return !getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) &&
	       info.tcpi_state == BPF_TCP_ESTABLISHED && info.tcpi_bytes_received == received;
}

int wire_leave(struct sgw_wire *wire, uint32_t id, const int *fds)
{
	struct wire_session session;
	bool is_whole = look_up(wire, id, &session);
	uint32_t leg;

	/* It cannot be that anything has come to our sockets since the switch. If it
	 * has, what we acknowledged is lost with them, and the session must not go on
	 * as if nothing had happened.
	 */
	for (leg = 0; leg < WIRE_WAYS; leg++)
		is_whole = is_whole && is_untouched(fds[leg], session.received[leg]);
	/* Closed in repair mode a socket sends nothing. Left open it would, after
	 * its timeout: the last acknowledgement went past it.
	 */
	for (leg = 0; leg < WIRE_WAYS; leg++) {
		if (repair(fds[leg]))
			is_whole = false;
		close(fds[leg]);
	}
	return is_whole ? occupy(&session.flows[LEG_BACKEND]) : -1;
}

int wire_keep(const struct sgw_wire *wire, uint32_t id)
{
	struct wire_session session;
	uint32_t way;

	/* What was told of it before, nobody has heard. */
	for (way = 0; way < WIRE_WAYS; way++)
		__atomic_store_n(&wire_slot(wire, id, way)->is_too_long, 0, __ATOMIC_SEQ_CST);
	return look_up(wire, id, &session) ? occupy(&session.flows[LEG_BACKEND]) : -1;
}

/* --- the end */

struct ports {
	uint16_t source;
	uint16_t target;
};

static uint16_t checksum(uint32_t sum, const void *data, size_t bytes)
{
	size_t i;

	for (i = 0; i < bytes; i += 2) {
		uint16_t word;

		memcpy(&word, (const char *)data + i, sizeof(word));
		sum += word;
	}
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

static void fill_reset(struct tcphdr *tcp, const struct wire_flow *to, uint32_t seq, uint32_t ack)
{
	struct {
		uint32_t hosts[8];
		uint32_t length;
		uint32_t protocol;
	} pseudo = { .length = htonl(sizeof(*tcp)), .protocol = htonl(IPPROTO_TCP) };
	uint16_t partial;

	memset(tcp, 0, sizeof(*tcp));
	tcp->source = to->target_port;
	tcp->dest = to->source_port;
	tcp->seq = htonl(seq);
	tcp->ack_seq = htonl(ack);
	tcp->doff = sizeof(*tcp) / 4;
	tcp->rst = 1;
	tcp->ack = 1;
	/* The words that IPv4 leaves empty add nothing to the sum. */
	memcpy(pseudo.hosts, to->target, 16);
	memcpy(pseudo.hosts + 4, to->source, 16);
	partial = (uint16_t)~checksum(0, &pseudo, sizeof(pseudo));
	tcp->check = checksum(partial, tcp, sizeof(*tcp));
}

/* Reset the peer of a leg, as the gateway's socket would. */
static void send_reset(const struct sgw_wire *wire, const struct wire_flow *to, uint32_t seq,
		       uint32_t ack)
{
	struct sockaddr_in6 peer;
	socklen_t length = wire_write_side(&peer, to->source, 0, to->family);

	if (to->family == AF_INET) {
		struct {
			struct iphdr ip;
			struct tcphdr tcp;
		} packet = { .ip = {
				     .version = 4,
				     .ihl = 5,
				     .frag_off = htons(IP_DF),
				     .ttl = FRESH_TTL,
				     .protocol = IPPROTO_TCP,
				     .saddr = to->target[0],
				     .daddr = to->source[0],
			     } };

		packet.ip.tot_len = htons(sizeof(packet));
		fill_reset(&packet.tcp, to, seq, ack);
		sendto(wire->raw4, &packet, sizeof(packet), MSG_DONTWAIT, (struct sockaddr *)&peer,
		       length);
	} else {
		struct {
			struct ip6_hdr ip;
			struct tcphdr tcp;
		} packet = { 0 };

		packet.ip.ip6_vfc = 0x60;
		packet.ip.ip6_plen = htons(sizeof(packet.tcp));
		packet.ip.ip6_nxt = IPPROTO_TCP;
		packet.ip.ip6_hlim = FRESH_TTL;
		memcpy(&packet.ip.ip6_src, to->target, 16);
		memcpy(&packet.ip.ip6_dst, to->source, 16);
		fill_reset(&packet.tcp, to, seq, ack);
		sendto(wire->raw6, &packet, sizeof(packet), MSG_DONTWAIT, (struct sockaddr *)&peer,
		       length);
	}
}

/* A receiver takes a reset at the very number that it expects next: that is behind
 * all that was sent to it, or, if something was lost on the way, what it has
 * acknowledged last. From any other number it is asked for, and the flow is out of
 * the map: the stack itself answers then.
 */
static void reset_leg(const struct sgw_wire *wire, uint32_t id, const struct wire_session *session,
		      uint32_t leg)
{
	const struct wire_slot *to = wire_slot(wire, id, !leg), *from = wire_slot(wire, id, leg);
	uint32_t offset = session->seq_offset[!leg];
	uint32_t sent = (to->has_fin ? to->fin_end : to->end) + offset;
	uint32_t ack = from->has_fin ? from->fin_end : from->end;

	send_reset(wire, &session->flows[leg], sent, ack);
	if (from->acked + offset != sent)
		send_reset(wire, &session->flows[leg], from->acked + offset, ack);
}

void wire_end(struct sgw_wire *wire, uint32_t id, bool is_client_reset, bool is_backend_reset)
{
	struct wire_session session;

	if (look_up(wire, id, &session)) {
		if (claim(wire, id))
			delete_flows(wire, id, &session);
		if (is_client_reset)
			reset_leg(wire, id, &session, LEG_CLIENT);
		if (is_backend_reset)
			reset_leg(wire, id, &session, LEG_BACKEND);
		set_state(wire, id, &session, WIRE_FREE);
	}
	/* Nothing that is told of it from now on is for its next owner. */
	wire_slot(wire, id, 0)->generation++;
	places_give_back(&wire->places, id);
}

/* --- packets that are too long */

/* The least that is quoted of a packet: its IP header, its ports and its number. */
struct quote {
	uint16_t source;
	uint16_t target;
	uint32_t seq;
};

static void tell_too_long4(const struct sgw_wire *wire, const struct wire_flow *from, uint32_t seq,
			   uint32_t mtu)
{
	struct {
		struct iphdr ip;
		struct icmphdr icmp;
		struct iphdr quoted;
		struct quote quote;
	} packet = { .ip = {
			     .version = 4,
			     .ihl = 5,
			     .tot_len = htons(sizeof(packet)),
			     .ttl = FRESH_TTL,
			     .protocol = IPPROTO_ICMP,
			     .saddr = from->target[0],
			     .daddr = from->source[0],
		     },
		     .icmp = {
			     .type = ICMP_DEST_UNREACH,
			     .code = ICMP_FRAG_NEEDED,
			     .un.frag.mtu = htons((uint16_t)mtu),
		     },
		     .quoted = {
			     .version = 4,
			     .ihl = 5,
			     .tot_len = htons((uint16_t)(mtu + 1)), /* at least */
			     .frag_off = htons(IP_DF),
			     .ttl = FRESH_TTL,
			     .protocol = IPPROTO_TCP,
			     .saddr = from->source[0],
			     .daddr = from->target[0],
		     },
		     .quote = { from->source_port, from->target_port, htonl(seq) } };
	struct sockaddr_in6 peer;
	socklen_t length = wire_write_side(&peer, from->source, 0, from->family);

	packet.quoted.check = checksum(0, &packet.quoted, sizeof(packet.quoted));
	packet.icmp.checksum = checksum(0, &packet.icmp, sizeof(packet) - sizeof(packet.ip));
	sendto(wire->raw4, &packet, sizeof(packet), MSG_DONTWAIT, (struct sockaddr *)&peer, length);
}

static void tell_too_long6(const struct sgw_wire *wire, const struct wire_flow *from, uint32_t seq,
			   uint32_t mtu)
{
	struct {
		struct ip6_hdr ip;
		struct icmp6_hdr icmp;
		struct ip6_hdr quoted;
		struct quote quote;
	} packet = { .quote = { from->source_port, from->target_port, htonl(seq) } };
	uint16_t bytes = sizeof(packet) - sizeof(packet.ip);
	uint32_t sized[] = { htonl(bytes), htonl(IPPROTO_ICMPV6) };
	struct sockaddr_in6 peer;
	socklen_t length = wire_write_side(&peer, from->source, 0, from->family);
	uint16_t partial;

	packet.ip.ip6_vfc = packet.quoted.ip6_vfc = 0x60;
	packet.ip.ip6_plen = htons(bytes);
	packet.ip.ip6_nxt = IPPROTO_ICMPV6;
	packet.ip.ip6_hlim = packet.quoted.ip6_hlim = FRESH_TTL;
	memcpy(&packet.ip.ip6_src, from->target, 16);
	memcpy(&packet.ip.ip6_dst, from->source, 16);
	packet.icmp.icmp6_type = ICMP6_PACKET_TOO_BIG;
	packet.icmp.icmp6_mtu = htonl(mtu);
	packet.quoted.ip6_plen = htons((uint16_t)(mtu + 1 - sizeof(packet.quoted))); /* at least */
	packet.quoted.ip6_nxt = IPPROTO_TCP;
	memcpy(&packet.quoted.ip6_src, from->source, 16);
	memcpy(&packet.quoted.ip6_dst, from->target, 16);
	partial = (uint16_t)~checksum(0, &packet.ip.ip6_src, 32);
	partial = (uint16_t)~checksum(partial, sized, sizeof(sized));
	packet.icmp.icmp6_cksum = checksum(partial, &packet.icmp, bytes);
	sendto(wire->raw6, &packet, sizeof(packet), MSG_DONTWAIT, (struct sockaddr *)&peer, length);
}

void wire_tell_too_long(const struct sgw_wire *wire, uint32_t id, uint32_t way)
{
	struct wire_slot *slot = wire_slot(wire, id, way);
	struct wire_session session;

	if (look_up(wire, id, &session))
		(session.flows[way].family == AF_INET ? tell_too_long4 : tell_too_long6)(
			wire, &session.flows[way], slot->too_long_seq, slot->mtu);
	__atomic_store_n(&slot->is_too_long, 0, __ATOMIC_SEQ_CST);
}

/* --- routes that change */

#define ROUTE_REQUEST_BYTES 256

static void add(struct nlmsghdr *message, uint16_t type, const void *data, uint16_t bytes)
{
	struct rtattr *attribute = (void *)((char *)message + NLMSG_ALIGN(message->nlmsg_len));

	attribute->rta_type = type;
	attribute->rta_len = RTA_LENGTH(bytes);
	memcpy(RTA_DATA(attribute), data, bytes);
	message->nlmsg_len = NLMSG_ALIGN(message->nlmsg_len) + RTA_SPACE(bytes);
}

/* The interface by which packets from the target of this flow to its source leave, 0 if
 * there is none. With the ports, because routes may be chosen by them.
 */
static uint32_t find_route(int netlink, const struct wire_flow *flow)
{
	char request[ROUTE_REQUEST_BYTES] __attribute__((aligned(8))) = { 0 };
	struct nlmsghdr *header = (struct nlmsghdr *)request;
	struct rtmsg *route = NLMSG_DATA(header);
	uint16_t host_bytes = flow->family == AF_INET ? 4 : 16;
	char answer[4096] __attribute__((aligned(8)));
	const struct nlmsghdr *message = (const struct nlmsghdr *)answer;
	uint8_t protocol = IPPROTO_TCP;
	const struct rtattr *attribute;
	unsigned int bytes;
	ssize_t received;

	header->nlmsg_len = NLMSG_LENGTH(sizeof(*route));
	header->nlmsg_type = RTM_GETROUTE;
	header->nlmsg_flags = NLM_F_REQUEST;
	route->rtm_family = (uint8_t)flow->family;
	route->rtm_dst_len = route->rtm_src_len = (uint8_t)(host_bytes * 8);
	add(header, RTA_DST, flow->source, host_bytes);
	add(header, RTA_SRC, flow->target, host_bytes);
	add(header, RTA_IP_PROTO, &protocol, sizeof(protocol));
	add(header, RTA_SPORT, &flow->target_port, sizeof(flow->target_port));
	add(header, RTA_DPORT, &flow->source_port, sizeof(flow->source_port));
	if (send(netlink, request, header->nlmsg_len, 0) < 0)
		return 0;
	received = recv(netlink, answer, sizeof(answer), 0);
	if (received < 0 || !NLMSG_OK(message, (size_t)received) ||
	    message->nlmsg_type != RTM_NEWROUTE)
		return 0;
	bytes = message->nlmsg_len - NLMSG_LENGTH(sizeof(struct rtmsg));
	for (attribute = RTM_RTA(NLMSG_DATA(message)); RTA_OK(attribute, bytes);
	     attribute = RTA_NEXT(attribute, bytes))
		if (attribute->rta_type == RTA_OIF)
			return *(const uint32_t *)RTA_DATA(attribute);
	return 0;
}

int sgw_wire_follow_routes(const struct sgw_wire *wire)
{
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	struct wire_session session;
	uint32_t i, way;

	if (netlink < 0)
		return -errno;
	for (i = 0; i < wire->settings.sessions; i++) {
		uint32_t id = wire->settings.first + i;

		if (wire_find(wire, id, &session) != WIRE_SWITCHED)
			continue;
		for (way = 0; way < WIRE_WAYS; way++) {
			uint32_t ifindex;

			if (!session.ifindex[way]) /* up the stack */
				continue;
			/* Without one, by loopback or not at all: it may come back. */
			ifindex = find_route(netlink, &session.flows[!way]);
			if (ifindex && ifindex != LOOPBACK_IFINDEX)
				__atomic_store_n(&wire_slot(wire, id, way)->route,
						 (uint64_t)session.generation << 32 | ifindex,
						 __ATOMIC_RELAXED);
		}
	}
	close(netlink);
	return 0;
}

/* --- sockets that cost no descriptor: the files of an io_uring that does nothing else */

int wire_vault_open(uint32_t places)
{
	struct io_uring_params params = { 0 };
	struct rlimit limit;
	int32_t *nothing;
	uint32_t i;
	int ring;

	/* It takes no more files than a process may have open; what it does not
	 * take costs a descriptor.
	 */
	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < places)
		places = (uint32_t)limit.rlim_cur;
	nothing = malloc(places * sizeof(*nothing));
	ring = nothing ? (int)syscall(SYS_io_uring_setup, 1, &params) : -1;

	for (i = 0; ring >= 0 && i < places; i++)
		nothing[i] = -1;
	if (ring >= 0 &&
	    syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES, nothing, places) < 0) {
		close(ring);
		ring = -1;
	}
	free(nothing);
	return ring;
}

static bool update(int ring, uint32_t place, int32_t fd)
{
	struct io_uring_files_update change = { .offset = place, .fds = (uint64_t)&fd };

	return ring >= 0 &&
	       syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES_UPDATE, &change, 1) == 1;
}

bool wire_vault_put(int ring, uint32_t place, int fd)
{
	return update(ring, place, fd);
}

void wire_vault_clear(int ring, uint32_t place)
{
	update(ring, place, -1);
}

void wire_free(struct sgw_wire *wire, uint32_t id)
{
	struct wire_session session;

	if (look_up(wire, id, &session)) {
		delete_flows(wire, id, &session);
		set_state(wire, id, &session, WIRE_FREE);
	}
	places_give_back(&wire->places, id);
}

/* --- for Python */

/* linux/bpf.h of Debian 12 does not know it (Linux 6.6). */
#define ATTACH_TCX_INGRESS ((enum bpf_attach_type)46)

#define ATTACH_BEFORE 8

int sgw_attach_tcx(int program, int ifindex, bool is_first)
{
	LIBBPF_OPTS(bpf_link_create_opts, options, .flags = is_first ? ATTACH_BEFORE : 0);

	return bpf_link_create(program, ifindex, ATTACH_TCX_INGRESS, &options);
}

const char *sgw_unfit_name(uint32_t unfit)
{
	static const char *const names[] = {
		[WIRE_TIMESTAMPS] = "timestamps",
		[WIRE_WINDOW_SCALING] = "window_scaling",
		[WIRE_SACK] = "sack",
		[WIRE_ECN] = "ecn",
		[WIRE_MSS] = "mss",
		[WIRE_MIXED_LEGS] = "mixed_legs",
		[WIRE_MIXED_FAMILIES] = "mixed_families",
		[WIRE_LINK_LOCAL] = "link_local",
		[WIRE_XFRM] = "xfrm",
		[WIRE_IP_OPTIONS] = "ip_options",
		[WIRE_FRAGMENTS] = "fragments",
		[WIRE_MPTCP] = "mptcp",
		[WIRE_NO_ROOM] = "no_wire_room",
		[WIRE_NO_MOMENT] = "no_moment",
		[WIRE_NOT_ESTABLISHED] = "not_established",
	};

	return unfit < sizeof(names) / sizeof(*names) && names[unfit] ? names[unfit] : "";
}

struct sgw_wire *sgw_wire_open(const struct sgw_wire_settings *settings)
{
	struct sgw_wire *wire = calloc(1, sizeof(*wire));

	if (!wire)
		return NULL;
	wire->settings = *settings;
	wire->raw4 = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
	wire->raw6 = socket(AF_INET6, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
	if (!places_open(&wire->places, settings->sessions) ||
	    wire->raw4 < 0) { /* a host may have no IPv6 */
		int error = errno;

		sgw_wire_close(wire);
		errno = error;
		return NULL;
	}
	set_free(wire);
	return wire;
}

void sgw_wire_narrow(struct sgw_wire *wire, uint32_t first, uint32_t sessions)
{
	wire->settings.first = first;
	wire->settings.sessions = sessions;
	set_free(wire);
}

void sgw_wire_reclaim(struct sgw_wire *wire, uint32_t first, uint32_t sessions)
{
	struct wire_session session;
	uint32_t id;

	for (id = first; id < first + sessions; id++) {
		if (!look_up(wire, id, &session) ||
		    (session.state != WIRE_ARMED && session.state != WIRE_SWITCHED &&
		     session.state != WIRE_UNFIT))
			continue;
		delete_flows(wire, id, &session);
		if (session.state == WIRE_SWITCHED) {
			reset_leg(wire, id, &session, LEG_CLIENT);
			reset_leg(wire, id, &session, LEG_BACKEND);
		}
		wire_slot(wire, id, 0)->generation++;
		set_state(wire, id, &session, WIRE_FREE);
	}
}

void sgw_wire_guard(struct sgw_wire *wire, uint32_t clsact_owner, int clsact_name, int alive)
{
	const struct sgw_wire_settings *settings = &wire->settings;
	int kept[] = { alive,	   settings->flows_map, settings->sessions_map,
		       wire->raw4, wire->raw6,		clsact_name };
	char byte;

	prctl(PR_SET_NAME, "sockgw-guard");
	sgw_close_all_but(kept, sizeof(kept) / sizeof(*kept));
	while (read(alive, &byte, 1) < 0 && errno == EINTR)
		;
	sgw_wire_reclaim(wire, settings->first, settings->sessions);
	if (clsact_owner)
		sgw_clsact_remove(clsact_owner);
	_exit(0);
}

void sgw_wire_totals(const struct sgw_wire *wire, uint32_t sessions, uint64_t *bytes)
{
	uint32_t id, way;

	for (way = 0; way < WIRE_WAYS; way++) {
		bytes[way] = 0;
		for (id = 0; id < sessions; id++)
			bytes[way] += wire_slot(wire, id, way)->bytes;
	}
}

size_t sgw_wire_slot_bytes(void)
{
	return sizeof(struct wire_slot);
}

void sgw_wire_close(struct sgw_wire *wire)
{
	if (wire->raw4 >= 0)
		close(wire->raw4);
	if (wire->raw6 >= 0)
		close(wire->raw6);
	places_close(&wire->places);
	free(wire);
}
