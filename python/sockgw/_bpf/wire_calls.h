/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the loop asks of the wire path (wire.c). An id is a session's place in the
 * maps; fds are the client's and the backend's socket.
 */
#ifndef SOCKGW_WIRE_CALLS_H
#define SOCKGW_WIRE_CALLS_H

#include <netinet/in.h>
#include <sys/socket.h>
#include "shim.h"
#include "wire.h"

/* The places of this process: the first id, and how many there are. */
uint32_t wire_first(const struct sgw_wire *wire);
uint32_t wire_sessions(const struct sgw_wire *wire);
struct wire_slot *wire_slot(const struct sgw_wire *wire, uint32_t id, uint32_t way);

/* One side of a flow, as a socket's address: its length. */
socklen_t wire_write_side(struct sockaddr_in6 *address, const uint32_t *host, uint16_t port,
			  uint32_t family);
/* Watch for the moment at which the session can go by wire: WIRE_FITS and its id,
 * or why it stays where it is. `told` is the largest window that each peer was told when it
 * was armed before; the slots' most_told has it then.
 */
enum wire_unfit wire_arm(struct sgw_wire *wire, const int *fds, uint32_t worker,
			 const uint32_t *told, uint32_t *id);
/* Bound what the sockets may receive while their targets are stalled. Not before this: a window
 * that was announced in the handshake counts on.
 */
void wire_bound(const int *fds);
/* Tell neither peer a window that the other does not have: once the session has switched that
 * would count. Their windows grow; so to be called again.
 */
void wire_fit_windows(const struct sgw_wire *wire, uint32_t id, const int *fds);
/* Take that back, and the id; false if the moment has come. Without fds the windows are left as
 * they are: the session is at its end. To be called before
 * anything is done to the sockets that their peers would see.
 */
bool wire_disarm(struct sgw_wire *wire, uint32_t id, const int *fds);
/* Close both sockets of a session that has switched; return another that keeps the
 * backend leg's ports from everybody, -1 if somebody had them first.
 */
int wire_leave(struct sgw_wire *wire, uint32_t id, const int *fds);
/* The last part of that by itself, for a session whose gateway has died. */
int wire_keep(const struct sgw_wire *wire, uint32_t id);
/* What is in a place of the maps. */
enum wire_state wire_find(const struct sgw_wire *wire, uint32_t id, struct wire_session *session);
/* Empty a place that a gateway left behind when it died, and have it back. */
void wire_free(struct sgw_wire *wire, uint32_t id);
/* The session has ended, or is to end: reset the sides that do not know, give the id back. */
void wire_end(struct sgw_wire *wire, uint32_t id, bool is_client_reset, bool is_backend_reset);

/* A packet of this way was too long for where it leaves: tell its sender. */
void wire_tell_too_long(const struct sgw_wire *wire, uint32_t id, uint32_t way);

/* Where sockets are kept without a descriptor, one in each place: a descriptor of
 * the whole, -1 where the kernel has none.
 */
int wire_vault_open(uint32_t places);
/* false: keep it otherwise. The descriptor stays the caller's to close. */
bool wire_vault_put(int vault, uint32_t place, int fd);
void wire_vault_clear(int vault, uint32_t place);

#endif
