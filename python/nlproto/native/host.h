/* SPDX-License-Identifier: MIT */
/*
 * host.h - bulk requests of engine `packet` to the kernel, as arrays for NumPy.
 *
 * Both cffi and the compiler read this file: plain declarations only.
 */

/* A socket, as sock_diag or /proc/net lists it. Ports in host, addresses in network order. */
struct host_socket {
	uint64_t cookie;	/* 0: not reported */
	uint64_t inode;		/* 0: no descriptor (TIME_WAIT, orphan, not accepted) */
	uint32_t uid;
	uint32_t ifindex;	/* SO_BINDTODEVICE, 0: none */
	uint16_t sport;		/* local */
	uint16_t dport;		/* remote, 0: none */
	uint8_t family;
	uint8_t proto;
	uint8_t state;		/* as in /proc/net/tcp */
	uint8_t reserved;
	uint8_t saddr[16];
	uint8_t daddr[16];
	uint32_t drops;		/* packets dropped at it, mostly for want of room; 0 without a dump */
	uint32_t zero;
};

/* The first bytes of a packet, from its IP header on; as many as in the module's snaps. */
struct host_snap {
	uint32_t caplen;
	uint8_t data[128];
};

/* Reader of one AF_PACKET ring (TPACKET_V2). */
struct host_ring {
	uint8_t *frames;
	uint32_t count;
	uint32_t size;		/* bytes a frame */
	uint32_t at;		/* next frame to read */
	uint32_t netns;
	uint32_t vnet;		/* a struct virtio_net_hdr precedes each packet */
	uint32_t reserved;
	int64_t mono_offset;	/* CLOCK_MONOTONIC minus CLOCK_REALTIME, ns */
	uint64_t packets;	/* frames read since the start */
	uint64_t fragments;	/* of these: later fragments */
	uint64_t truncated;	/* headers incomplete */
	uint64_t other;		/* neither TCP nor UDP after all */
	struct host_snap *snaps;	/* NULL, or room for one entry for each record */
};

/* A record before naming, with facts that only the frame has. */
struct host_frame {
	uint8_t to_all;		/* received as multicast or broadcast */
};

/* Reads up to max frames as records (how 0). Returns their number, without skipped ones. */
uint32_t host_ring_read(struct host_ring *ring, struct sniffer_record *records,
			struct host_frame *frames, uint32_t max);

/* How many frames wait that the kernel has completed without a hole. */
uint32_t host_ring_waiting(const struct host_ring *ring);

/* Whether so many frames wait, at least 1. Looks at one of them. */
int host_ring_holds(const struct host_ring *ring, uint32_t frames);

/* The sizes for a ring whose frames hold snap bytes of a packet. */
uint32_t host_frame_size(uint32_t snap);

/* Starts an AF_PACKET socket made with protocol 0: all protocols, all interfaces. 0 or -errno. */
int host_capture_all(int fd);

/* Figures of a TCP connection, open or ended. */
struct host_tcp {
	uint64_t cookie;
	uint32_t netns;		/* the caller fills it in */
	uint32_t rtt_us;	/* smoothed; 0: never measured */
	uint32_t retransmits;	/* segments, since the socket connected */
	uint32_t reserved;
};

/*
 * Reads struct tcp_info from the answers in one datagram, or from the kernel's reports
 * of closed connections (seq 0). Leaves out sockets without such data, as listeners.
 * Otherwise like host_diag_read().
 */
int host_tcp_read(const uint8_t *buf, uint32_t len, uint32_t seq, struct host_tcp *found,
		  uint32_t max, int *done);

/*
 * Reads the answers in one datagram into sockets. Returns how many there are, or -errno
 * for an error answer. Sets *done after the last one.
 */
int host_diag_read(const uint8_t *buf, uint32_t len, uint32_t seq, uint8_t proto,
		   struct host_socket *sockets, uint32_t max, int *done);

/*
 * Sends a request of Netlink (length 0: none) and receives one datagram. Returns its bytes, -errno,
 * -ETIMEDOUT after patience_ms, or -EMSGSIZE if it is longer than `size`. One call: Python's lock
 * is fought for at the end of each.
 */
int host_exchange(int fd, const uint8_t *request, uint32_t length, uint8_t *buf, uint32_t size,
		  int patience_ms);

/*
 * Sends a request (length 0: none) and reads its answers into `found`, by way of `buf`. It ends at
 * *done or when `found` has no room for another datagram. For a request without dump, one answer is
 * all: `max` is 1. Returns how many, or as host_exchange() does.
 */
int host_diag_ask(int fd, const uint8_t *request, uint32_t length, uint8_t *buf, uint32_t size,
		  uint32_t seq, uint8_t proto, struct host_socket *found, uint32_t max, int *done,
		  int patience_ms);

/*
 * Sends `count` requests without dump one after the other, `length` bytes each. Reads the answer
 * of each into its place in `found`. results: 1, 0 or -errno of each. It ends at the first error
 * but -ENOENT. Returns how many results there are.
 */
uint32_t host_diag_find(int fd, const uint8_t *requests, uint32_t length, uint32_t count,
			uint8_t *buf, uint32_t size, struct host_socket *found, int *results,
			int patience_ms);

/* Moves the calling thread into the network namespace of fd. 0 or -errno. */
int host_setns_net(int fd);

/* A process's descriptor of a socket. */
struct host_held {
	uint64_t inode;
	uint32_t pid;
	uint32_t fd;
};

/*
 * Reads the sockets among the descriptors of `count` processes; procfd is an open
 * /proc. Returns how many; if that is max, there may be more. *refused counts processes
 * that may not be read.
 */
int host_held_sockets(int procfd, const uint32_t *pids, uint32_t count, struct host_held *held,
		      uint32_t max, uint32_t *refused);

/*
 * Accepts up to max waiting connections of a non-blocking listener, each close-on-exec
 * and non-blocking. Returns how many the caller has to decide on, or -errno if the
 * first one fails. Those of the uids `shut` that are not in `group` (-1: no group) are
 * closed at once and counted.
 */
int host_accept(int listener, int *fds, uint32_t max, const uint32_t *shut, uint32_t shut_count,
		int64_t group, uint32_t *refused);

/*
 * Read the first `size` bytes of a file of /proc in one read, which gives all there is; bytes or
 * -errno. One call, since Python's lock is fought for at the end of each.
 */
int host_read(const char *path, char *buf, uint32_t size);

/*
 * As host_read(), of a file whose read may never end: -ETIMEDOUT after patience_ms, and the thread
 * that reads is left behind until it can go on. -EBUSY while 16 threads are.
 */
int host_read_patiently(const char *path, char *buf, uint32_t size, uint32_t patience_ms);

struct host_owner {
	uint64_t start_ticks;	/* field 22 of /proc/PID/stat */
	uint32_t pid;
	uint32_t ppid;
	uint32_t uid;		/* the real one; host_owners() alone reads it */
	uint32_t comm_len;	/* 0xffffffff: there is no such process */
	char comm[64];		/* a kernel worker's is longer than 15 */
};

/* Read the text of a /proc/PID/stat, which ends with a NUL; 0 if it is none. */
int host_parse_stat(struct host_owner *one, const char *text, uint32_t size);

/* Who a process is, by one file: without its uid. 0 or -errno. */
int host_stat(const char *proc, struct host_owner *one);

/* Who some processes are: pid says of whom. `proc` is where /proc is. */
void host_owners(const char *proc, struct host_owner *some, uint32_t count);

/* Which network namespace each process is in; 0: not to be seen. */
void host_net_namespaces(const char *proc, const uint32_t *pids, uint32_t count, uint64_t *inodes);

/* Clear the pid of those that do not have their socket at their descriptor any more. */
void host_still_held(const char *proc, struct host_held *held, uint32_t count);

/*
 * Opens a file below a directory for reading, through no link and no mount. Never waits
 * for a FIFO. Returns the descriptor or -errno.
 */
int host_open_beneath(int directory, const char *path);

/* Close some descriptors. */
void host_close(const int *fds, uint32_t count);

/* From now on all threads share one heap, so that memory freed by one serves another. */
void host_one_heap(void);

/* From now on up to so many free bytes stay with the process, at most 32 MiB. */
void host_keep_heap(uint32_t bytes);

/* Gives memory back to the kernel: free memory, and code pages that only the start used. */
void host_trim(void);
